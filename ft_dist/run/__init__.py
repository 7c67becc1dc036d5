"""One rank's run: its parts, its position and its records."""
