"""The verbs of `ft-dist`, a file for each group."""
