"""Throughput of this machine: the product's own training loop under a stop watch, its parts, settings and scaling."""
