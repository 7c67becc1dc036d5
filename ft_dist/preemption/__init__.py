"""Preemption notices, turned into one flag that the training loop reads."""
