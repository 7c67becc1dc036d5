"""Simulates a training step on an H100 without a GPU: finds what would fail there and counts what it would cost."""
