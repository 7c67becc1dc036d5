"""Everything that needs a GPU, as a list of independent stages. `benchmarks/gpu.sh` runs it."""
