"""What a user would pick instead of us, run beside us on the same work: an environment recipe, a config and a log parser a peer."""
