"""Faults planted in a step, each of which the simulated GPU must find."""
