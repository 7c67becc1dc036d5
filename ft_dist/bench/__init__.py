"""Throughput of this machine: timings of the real training loop, of its phases, settings and scaling."""
