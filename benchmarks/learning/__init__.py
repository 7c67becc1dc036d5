"""The effect of a setting on what a run learns: final held-out loss and accuracy, seed by seed."""
