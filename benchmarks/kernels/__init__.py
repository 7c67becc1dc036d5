"""Benchmarks of the kernels and their use of chip resources. Runs from a source tree that is not installed."""

import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("ft_dist_kernels") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels"))
