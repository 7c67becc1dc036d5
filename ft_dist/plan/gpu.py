"""The table of GPUs (`gpus.yaml`), and this machine's devices, found without torch."""

import os
import re
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from ft_dist.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """Rates per second: `flops`, `matmul`, `fp8`, `fp32` and `attention` in FLOP, the others in bytes. `memory` in
    bytes. `fp8` is None without FP8.

    `link` and `network` are per GPU and direction: within its node, and to other nodes.
    """

    key: str
    name: str
    memory: int
    flops: float
    matmul: float
    fp8: float | None
    fp32: float
    attention: float
    bandwidth: float
    link: float
    network: float
    per_node: int
    pcie_flops: float | None
    """`flops` of the PCIe card, if it is slower"""


@cache
def gpus() -> dict[str, Gpu]:
    tree = yaml.safe_load((Path(__file__).parent / "gpus.yaml").read_text(encoding="utf-8"))
    return {
        key: Gpu(
            key=key,
            name=row["name"],
            memory=int(row["memory"] * GIB),
            flops=row["flops"] * 1e12,
            matmul=row["matmul"] * 1e12,
            fp8=row["fp8"] * 1e12 if "fp8" in row else None,
            fp32=row["fp32"] * 1e12,
            attention=row["attention"] * 1e12,
            bandwidth=row["bandwidth"] * 1e9,
            link=row["link"] * 1e9,
            network=row["network"] * 1e9,
            per_node=row["per_node"],
            pcie_flops=row["pcie_flops"] * 1e12 if "pcie_flops" in row else None,
        )
        for key, row in tree.items()
    }


def gpu_named(key: str) -> Gpu:
    """Raises UserError."""
    found = gpus().get(key)
    if found is None:
        raise UserError(f"--gpu {key}: unknown. Use one of {', '.join(gpus())} (ft_dist/plan/gpus.yaml).")
    return found


def gpu_like(name: str) -> Gpu | None:
    """The table's row for a name used by drivers, clouds and clusters, such as `NVIDIA H100 80GB HBM3` or
    `A100-80GB`."""
    words = re.sub(r"[^a-z0-9]+", " ", name.lower()).split()
    for key in gpus():
        first = key.split("-")[0]
        if any(first in word for word in words):
            return gpus()[key]
    return None


def peak_flops(name: str) -> float | None:
    """Dense bf16 peak in FLOP/s of the GPU that its driver calls `name`; None if it is not in the table."""
    gpu = gpu_like(name)
    if gpu is None:
        return None
    return gpu.pcie_flops if gpu.pcie_flops and "PCIe" in name else gpu.flops


@dataclass(frozen=True)
class Device:
    """A rank's device. `memory` in bytes; for a CPU the free memory divided by the node's ranks."""

    name: str
    memory: int
    gpu: bool


def device_here(ranks_per_node: int) -> Device | None:
    """The smallest GPU of this machine, or its memory without a GPU; None if neither is known."""
    if gpus_here():
        return _nvidia()
    free = free_host_memory()
    return Device("this machine's memory", free // ranks_per_node, gpu=False) if free else None


def gpus_here() -> bool:
    """Whether this process may see an NVIDIA GPU, found without importing torch."""
    return any(Path("/dev").glob("nvidia[0-9]*")) and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1")


def _nvidia() -> Device | None:
    command = ["nvidia-smi", "--query-gpu=memory.total,name", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        rows = [line.split(",", 1) for line in done.stdout.strip().splitlines()]
        mib, name = min((int(mib), name.strip()) for mib, name in rows)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return Device(name, mib * 2**20, gpu=True)


def free_host_memory() -> int | None:
    """Bytes available to new processes: what the kernel reports, or less if a cgroup limits it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            left = int(Path(limit).read_text()) - int(Path(used).read_text())
        except (OSError, ValueError):
            continue
        free = min(free, max(left, 0))
    return free
