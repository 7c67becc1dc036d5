"""A run reports its own resource use."""

import subprocess
import sys

import numpy as np


def test_the_peak_of_a_process_excludes_its_parents():
    code = "import torch; from ft_dist.resources import peak_memory_bytes as peak; print(peak(torch.device('cpu')))"
    alone = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    large = np.ones(alone // 4)  # twice as much
    beside = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert beside < 1.2 * alone < large.nbytes
