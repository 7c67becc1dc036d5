"""The order of samples, their packing into rows, and the batches of a step."""
