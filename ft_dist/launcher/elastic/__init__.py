"""The workers of a run as they fail, restart, join and leave."""
