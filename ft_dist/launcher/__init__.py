"""Starting a run on this machine or on several, keeping it alive, and leaving nothing behind."""
