"""Benchmarks; each is its own command: `python -m benchmarks.<name>`."""
