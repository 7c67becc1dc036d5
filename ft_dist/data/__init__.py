"""From the user's files to the tensors of a step: read, encode, store, stream; prepare runs the first three in advance.

Importing this package imports nothing heavy; `read` needs neither torch nor numpy.
"""
