"""From the user's files to the tensors of a step: sources, formats, template, store, order, packing, batch.

Importing this package imports nothing heavy; `sources`, `formats` and `check` need neither torch nor numpy.
"""
