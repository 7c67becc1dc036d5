"""Start a run on one machine or several, keep it alive, and leave no process behind."""
