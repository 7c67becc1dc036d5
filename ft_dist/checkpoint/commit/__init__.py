"""Writes a commit and keeps it: format, snapshot, background writer, mirror, retention."""
