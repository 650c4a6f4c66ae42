"""A run that can stop and go on."""
