"""Where a run can be submitted: one file per kind of cluster."""
