"""A training step as if on an H100, on a machine without a GPU: what would fail there, and what it would cost."""
