"""The simulated GPU: its device, the launches it records, and what a step costs."""
