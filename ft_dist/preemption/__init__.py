"""Notices that the machine is about to go away, turned into one flag that the training loop reads."""
