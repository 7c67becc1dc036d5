"""Writing and keeping commits: format, snapshot, background writer, mirror, retention."""
