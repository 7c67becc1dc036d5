"""What a user would pick instead of us, beside us on the same work: for each a recipe, a config and a log parser."""
