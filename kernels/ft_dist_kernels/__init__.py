"""Fused operations of the training step. One op a file; imports torch and triton only."""
