"""The parts of a model: their kinds, the layers that a method can pick, the rows of new tokens, what a run trains."""
