"""The verbs of `ft-dist`, one file per group."""
