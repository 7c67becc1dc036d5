"""Commits: what a run needs to go on from a step, readable on any number of ranks and any ZeRO stage."""
