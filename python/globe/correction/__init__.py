"""Corrections in closed form of what a compressed layer gives, one layer after another."""
