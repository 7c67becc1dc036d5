"""Plots of what `ft_dist.plan` says, for the docs."""
