"""Faults planted in a step; the simulated GPU must find each of them."""
