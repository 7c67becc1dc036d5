"""Optimizers that work on flat partitions, and learning rates."""
