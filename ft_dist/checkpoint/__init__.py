"""Commits: everything a run needs to resume from a step, loadable on any number of ranks and any ZeRO stage."""
