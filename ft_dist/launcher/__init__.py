"""Ways to start a run: here on this machine; clusters come in beside it."""
