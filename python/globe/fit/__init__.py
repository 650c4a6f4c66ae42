"""Codes, bank and left factors fitted to the experts (specification, G to I), and the joint fit."""
