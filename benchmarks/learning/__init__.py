"""What a setting does to what a run learns: final held-out loss and accuracy, seed by seed."""
