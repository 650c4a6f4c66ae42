"""Bytes and memory, from shapes alone."""
