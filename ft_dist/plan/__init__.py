"""Memory, time and cost of a run from its config and the model's config.json, without torch or a GPU."""
