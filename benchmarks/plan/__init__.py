"""Plots of the plan's figures, for the docs."""
