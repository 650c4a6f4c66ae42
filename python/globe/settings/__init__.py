"""Every setting of a compression: its key, its default, its bounds, and its YAML."""

from globe.settings.keys import SIZES, Settings
from globe.settings.units import parse_bytes, parse_seconds, seconds_text

__all__ = ["SIZES", "Settings", "parse_bytes", "parse_seconds", "seconds_text"]
