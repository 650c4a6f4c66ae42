"""Healing: a compressed model learns from the original."""
