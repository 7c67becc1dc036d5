"""Memory, time and cost of a run from its config and the model's config.json: before a GPU is held, without torch."""
