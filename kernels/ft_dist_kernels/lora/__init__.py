"""Linear layers with low-rank adapters."""
