"""Inputs that nobody planned: each either works or ends in one clear line. `make fuzz` tries 10,000 per target."""
