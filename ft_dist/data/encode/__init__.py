"""Samples to tokens and labels."""
