"""One rank of a run in which a bit of a weight changes: `python -m tests.engine.replica_ranks RANK STEP CONFIG [...]`.

On rank RANK, before step STEP, in the largest weight that the run does not train; or that it trains, if
FT_DIST_TEST_TRAINED is set.
"""

import os
import sys
from typing import Any

import torch

import ft_dist.train as train


def flip(run: Any) -> None:
    trained = "FT_DIST_TEST_TRAINED" in os.environ
    weights = [p for p in run.engine.objective.parameters() if p.requires_grad == trained]
    largest = max(weights, key=lambda p: p.numel())
    bits = {2: torch.int16, 4: torch.int32}[largest.element_size()]
    largest.data.view(-1).view(bits)[largest.numel() // 2] ^= 1


def main() -> int:
    rank, step, *arguments = sys.argv[1:]
    take_step = train.take_step

    def with_a_flip(run: Any, stop: Any, batch: Any) -> None:
        if run.step + 1 == int(step) and run.world.rank == int(rank):
            flip(run)
        take_step(run, stop, batch)

    train.take_step = with_a_flip
    return train.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
