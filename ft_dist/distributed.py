"""Where this process stands in the world, and the few collectives that the loop needs.

The world comes from the environment that torchrun, our launcher or SLURM sets (RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR, MASTER_PORT); without it the process is a world of its own.
"""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """Rank, size and device of this process."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def join_world(*, timeout_s: int) -> World:
    """Initialise the process group: NCCL on GPUs, gloo on CPU. Call `leave_world` at the end."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device = torch.device("cpu")
        backend = "gloo"
        # DeepSpeed would otherwise probe for accelerators, and pick one that torch was not built for
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("LOCAL_RANK", str(local_rank))
    kwargs: dict[str, Any] = {"rank": rank, "world_size": size, "timeout": timedelta(seconds=timeout_s)}
    if "MASTER_PORT" in os.environ:
        dist.init_process_group(backend, init_method="env://", **kwargs)
    else:
        # a world of one needs no port
        dist.init_process_group(backend, store=dist.HashStore(), **kwargs)
        os.environ.setdefault("MASTER_PORT", "29500")
    return World(rank=rank, size=size, local_rank=local_rank, local_size=local_size, device=device)


def leave_world() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def sum_over_ranks(values: list[float], world: World) -> list[float]:
    """Sum each number over all ranks, in double precision."""
    if world.size == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=world.device)
    dist.all_reduce(tensor)
    return [float(value) for value in tensor.tolist()]


def max_over_ranks(value: float, world: World) -> float:
    if world.size == 1:
        return value
    tensor = torch.tensor([value], dtype=torch.float64, device=world.device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor.item())


def control_store() -> dist.Store:
    """The ranks' common key-value store, by a connection of its own: a thread may use it beside collectives."""
    return dist.distributed_c10d._get_default_store().clone()


def barrier(world: World) -> None:
    if world.size > 1:
        max_over_ranks(0.0, world)
