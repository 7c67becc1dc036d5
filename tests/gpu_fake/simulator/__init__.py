"""The simulated GPU: its device, the launches it records, and the cost of a step."""
