"""Everything that needs a GPU, as a list of stages that cannot spoil each other. `benchmarks/gpu.sh` runs it."""
