"""Where a run can be submitted: one file for each kind of cluster."""
