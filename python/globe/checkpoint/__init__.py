"""A source directory: its tensor files, its index, its layouts."""
