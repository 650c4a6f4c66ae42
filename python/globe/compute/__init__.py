"""Products on a device."""
