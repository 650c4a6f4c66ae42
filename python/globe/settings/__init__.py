"""Every setting of a compression: its key, its default, its bounds, and its YAML."""

from globe.settings.keys import SIZES, Settings, parse_bytes

__all__ = ["SIZES", "Settings", "parse_bytes"]
