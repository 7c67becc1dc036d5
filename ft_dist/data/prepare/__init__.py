"""Tokenises a data set ahead of training and reports on it."""
