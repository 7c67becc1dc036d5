"""Optimizers over flat partitions, and learning-rate schedules."""
