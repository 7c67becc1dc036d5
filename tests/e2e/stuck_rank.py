"""One rank of a run; on rank 1 the fourth batch never arrives: `python -m tests.e2e.stuck_rank FIFO ARGUMENTS`.

Its loader opens FIFO, which has no writer, so it blocks like a read from a dead file system.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ft_dist.data.stream import batch
from ft_dist.train import main

collate = batch.collate
calls = 0


def collate_three(rows: Sequence[batch.Row], *arguments: Any, **options: Any) -> batch.MicroBatch:
    global calls
    calls += bool(rows)
    # three rows per step on each of two ranks, one row per micro-batch
    if rows and calls > 9:
        Path(sys.argv[1]).read_bytes()
    return collate(rows, *arguments, **options)


if os.environ["RANK"] == "1":
    batch.collate = collate_three
sys.exit(main(sys.argv[2:]))
