"""A matrix of faults: each kind is injected into a real run, and nothing may be lost. `make faults-matrix` runs all."""
