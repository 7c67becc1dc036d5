"""One rank of two that meets `decided` in every way that rank 0, or one rank alone, can fail.

Prints what it got as JSON, one line per case.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ft_dist.distributed import World, decided, join_world, leave_world
from ft_dist.errors import DataError
from ft_dist.network.open import open_store

GROUP_TIMEOUT_S = 3.0


class Plain(Exception):  # noqa: N818 - such as Triton's errors, which derive from Exception alone
    pass


def raising(error: Exception) -> Callable[[], Any]:
    def decide() -> Any:
        raise error

    return decide


def alone(world: World, rank: int) -> Callable[[], Any]:
    """A collective that `rank` never enters."""

    def decide() -> Any:
        if world.rank == rank:
            raise MemoryError(f"only on rank {rank}")
        dist.all_reduce(torch.ones(1))

    return decide


def main() -> None:
    world = join_world(open_store(timeout_s=GROUP_TIMEOUT_S), timeout_s=GROUP_TIMEOUT_S)
    cases: dict[str, tuple[Callable[[], Any], bool]] = {
        "answer": (lambda: {"rank": world.rank}, False),
        "answer together": (lambda: {"rank": world.rank}, True),
        "user": (raising(DataError("x.jsonl: bad")), False),
        "plain": (raising(Plain("out of resource: shared memory\nmore")), False),
        "memory together": (raising(MemoryError()), True),
        "rank 1 alone": (alone(world, 1), True),
        "rank 0 alone": (alone(world, 0), True),
    }
    for key, (decide, together) in cases.items():
        try:
            got = decided(world, key, decide, timeout_s=60, together=together)
        except Exception as error:
            got = f"{type(error).__name__}: {error}"
        print(json.dumps({"case": key, "got": got}), flush=True)
    if world.is_main:
        os._exit(0)  # it hosts the store
    try:
        decided(world, "lost", dict, timeout_s=60)
    except Exception as error:
        print(json.dumps({"case": "lost", "got": f"{type(error).__name__}: {error}"}), flush=True)
    leave_world()


if __name__ == "__main__":
    main()
    sys.exit(0)
