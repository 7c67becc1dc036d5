"""Linear layers with weights in FP8 and NF4."""
