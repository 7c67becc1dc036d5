"""Whole training steps, ours against what a user would run instead."""

import benchmarks.kernels  # noqa: F401 - makes the kernels importable from a source tree that is not installed
