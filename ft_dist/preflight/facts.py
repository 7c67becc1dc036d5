"""One rank's facts about its node, as JSON with the same keys on every rank, so that rank 0 can compare them."""

import os
import resource
import shutil
import socket
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ft_dist.config import RunConfig
from ft_dist.preflight.interface import own_address
from ft_dist.preflight.node import node_name
from ft_dist.preflight.nvidia import ask_driver
from ft_dist.preflight.same import code_hash, config_hash
from ft_dist.resources import versions


def facts(config: RunConfig, *, rank: int, size: int) -> dict[str, Any]:
    """The facts of this rank. Sizes in bytes."""
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    return {
        "node": node_name(),
        "machine": socket.gethostname(),
        "rank": rank,
        "world_size": size,
        "local_size": local_size,
        "code": code_hash(),
        "config": config_hash(config),
        "versions": versions() | {"cuda": str(torch.version.cuda)},
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "free_disk": free_disk(config.run_dir),
        "address": own_address(),
        "gpu": gpu_facts(int(os.environ.get("LOCAL_RANK", rank))),
    }


def free_disk(folder: Path) -> int:
    """Bytes free where `folder` is or would be."""
    while not folder.exists():
        folder = folder.absolute().parent
    return shutil.disk_usage(folder).free


def gpu_facts(local_rank: int) -> dict[str, Any] | None:
    """Facts about this rank's GPU; None without GPUs. `fault` is set if the GPU cannot compute; `driver` and `errors`
    come from its driver."""
    if not torch.cuda.is_available():
        return None
    count = torch.cuda.device_count()
    if local_rank >= count:
        return _gpu(count)
    try:
        free, total = torch.cuda.mem_get_info(local_rank)
        name = torch.cuda.get_device_name(local_rank)
        uuid = getattr(torch.cuda.get_device_properties(local_rank), "uuid", None)
        reported = ask_driver(f"GPU-{uuid}") if uuid else {}
        return (
            _gpu(count) | {"fault": _miscalculation(local_rank), "name": name, "free": free, "total": total} | reported
        )
    except RuntimeError as error:
        return _gpu(count) | {"fault": str(error).splitlines()[0]}


def _gpu(count: int) -> dict[str, Any]:
    return {"count": count, "fault": None, "name": None, "free": 0, "total": 0, "driver": None, "errors": []}


def _miscalculation(local_rank: int) -> str | None:
    """Multiply small whole numbers, which bf16 with fp32 sums computes exactly; returns the fault, if any."""
    whole = partial(torch.randint, -2, 3, generator=torch.Generator().manual_seed(0))
    left, right = whole((256, 256)).double(), whole((256, 256)).double()
    device = torch.device("cuda", local_rank)
    found = (left.to(device, torch.float32) @ right.to(device, torch.float32)).double().cpu()
    return None if torch.equal(found, left @ right) else "the product of two integer matrices is wrong"
