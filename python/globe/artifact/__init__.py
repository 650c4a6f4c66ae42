"""The factored directory: written, read, exported, shared."""
