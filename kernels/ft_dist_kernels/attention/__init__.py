"""Attention over packed rows that never crosses samples."""
