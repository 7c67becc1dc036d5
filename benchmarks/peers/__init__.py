"""Other trainers on the same work as ours: for each a recipe, a config and a log parser."""
