"""Fused operations of the training step. One folder per large op, one file per small one; imports torch and triton
only."""
