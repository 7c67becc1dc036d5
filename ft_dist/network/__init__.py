"""Connections between the processes of a run, closed to everybody who does not know its secret."""
