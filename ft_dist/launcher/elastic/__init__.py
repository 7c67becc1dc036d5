"""Keep a run alive while workers and nodes fail, restart, join and leave."""
