"""One rank's run: its parts, its position and what it records."""
