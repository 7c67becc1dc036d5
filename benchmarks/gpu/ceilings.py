"""Versions, and the ceilings of this chip: a device copy, products in bf16 and FP8, and attention at a new shape.

Every figure is its own row; a figure that cannot be measured gives the reason, and the others follow.
"""

import argparse
import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.rows import emit, guarded

PACKAGES = ("torch", "triton", "transformers", "peft", "deepspeed", "liger-kernel", "unsloth", "flash-attn", "numpy")
HEADS, KV_HEADS, WIDTH = 32, 8, 128
"""Of Llama-3-8B"""
PROPERTIES = ("name", "total_memory", "multi_processor_count", "major", "minor", "L2_cache_size")
QUERY = "name,driver_version,pstate,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu,memory.used"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.ceilings")
    parser.add_argument("--tiny", action="store_true", help="small shapes on CPU, to try the command")
    tiny = parser.parse_args().tiny
    device = "cpu" if tiny else "cuda"
    about(device)
    if device == "cuda" and not torch.cuda.is_available():
        print("torch finds no GPU", file=sys.stderr)
        return 1
    failed: list[str] = []
    for name, measure in (("copy", copy), ("bf16 product", bf16_product), ("fp8 product", fp8_product)):
        with guarded("ceiling", name=name) as problems:
            row = emit("ceiling", name=name, **measure(device, 256 if tiny else 8192))
            print({key: value for key, value in row.items() if value is not None}, flush=True)
        failed += [] if tiny and name == "fp8 product" else problems  # some processors have no row-scaled FP8 product
    for name, attention in attentions(device).items():
        with guarded("attention", name=name):  # a missing backend is a finding, not a failure
            first_and_second_use(name, attention, device, tiny=tiny)
    return 1 if failed else 0


def about(device: str) -> None:
    versions: dict[str, Any] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    chip: dict[str, Any] = {}
    if device == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        chip = {name: getattr(properties, name, None) for name in PROPERTIES}
        versions |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    row = emit("about", device=device, versions=versions, chip=chip, smi=smi(), cores=os.cpu_count())
    print(row, flush=True)


def smi() -> str | None:
    """Driver, clocks and power limit; reads only."""
    try:
        command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=10).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def seconds_of(call: Callable[[], Any], device: str, *, repeats: int = 20) -> dict[str, float]:
    """Median and minimum seconds per call, by device events."""
    for _ in range(3):
        call()
    taken = []
    for _ in range(repeats):
        if device == "cpu":
            started = time.perf_counter()
            call()
            taken.append(time.perf_counter() - started)
            continue
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        call()
        after.record()
        after.synchronize()
        taken.append(before.elapsed_time(after) / 1e3)
    return {"seconds": statistics.median(taken), "least_seconds": min(taken)}


def copy(device: str, size: int) -> dict[str, Any]:
    """Bytes read and written by a copy far larger than any cache."""
    source = torch.randn(size * size * 8 // 2, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    found = seconds_of(lambda: target.copy_(source), device)
    moved = 2 * source.numel() * source.element_size()
    return {"bytes": moved, **found, "bytes_per_s": moved / found["seconds"]}


def bf16_product(device: str, size: int) -> dict[str, Any]:
    """Back to back for about a second, as in training: the rate that power allows, and that of the fastest call."""
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    found = seconds_of(lambda: a @ b, device, repeats=5 if device == "cpu" else 800)
    flops = 2 * size**3
    rates = {"flops_per_s": flops / found["seconds"], "best_flops_per_s": flops / found["least_seconds"]}
    return {"size": size, **found, **rates}


def fp8_product(device: str, size: int) -> dict[str, Any]:
    """Rows of both operands scaled: what a frozen base in FP8 uses, in forward (x W^T) and backward."""
    low = torch.finfo(torch.float8_e4m3fn).max
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    scale_a, scale_b = (x.abs().amax(1, keepdim=True) / low for x in (a, b))
    a8, b8 = (a / scale_a).to(torch.float8_e4m3fn), (b / scale_b).to(torch.float8_e4m3fn)

    def product(fast: bool) -> torch.Tensor:
        to = {"scale_a": scale_a, "scale_b": scale_b.T, "out_dtype": torch.bfloat16, "use_fast_accum": fast}
        return torch._scaled_mm(a8, b8.T, **to)

    error = float((product(True).double() - a.double() @ b.double().T).norm() / (a.double() @ b.double().T).norm())
    repeats = 5 if device == "cpu" else 400
    fast = seconds_of(lambda: product(True), device, repeats=repeats)
    slow = seconds_of(lambda: product(False), device, repeats=repeats)
    flops = 2 * size**3
    rates = {"flops_per_s": flops / fast["seconds"], "flops_per_s_exact_sums": flops / slow["seconds"]}
    return {"size": size, **fast, **rates, "relative_error": error}


def attentions(device: str) -> dict[str, Callable[..., torch.Tensor]]:
    """By name: forward of causal attention over q (B, N, S, D), k and v (B, M, S, D)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def with_backend(backend: Any) -> Callable[..., torch.Tensor]:
        def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        return run

    def by_default(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    found = {"default": by_default, "math": with_backend(SDPBackend.MATH)}
    if device == "cuda":
        found = {"default": by_default, "flash": with_backend(SDPBackend.FLASH_ATTENTION)}
        found |= {"cudnn": with_backend(SDPBackend.CUDNN_ATTENTION), "varlen": varlen}
        found |= {"efficient": with_backend(SDPBackend.EFFICIENT_ATTENTION)}
    return found


def varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The same rows concatenated, through torch's variable-length kernel."""
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    batch, _, positions, _ = q.shape
    ends = torch.arange(0, (batch + 1) * positions, positions, dtype=torch.int32, device=q.device)
    flat = [x.transpose(1, 2).reshape(batch * positions, x.shape[1], x.shape[3]) for x in (q, k, v)]
    known = inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "enable_gqa" in known:
        causal["enable_gqa"] = True
    return varlen_attn(*flat, ends, ends, positions, positions, **causal)


def first_and_second_use(name: str, attention: Callable[..., torch.Tensor], device: str, *, tiny: bool) -> None:
    """Seconds of forward and backward for the first and second call at each of four shapes: the first
    also loads the backend, the others show the cost of a new shape. The last shape is large; its rate counts."""
    shapes = ((3, 31), (2, 17)) if tiny else ((3, 311), (5, 177), (2, 1003), (2, 4096))
    uses = []
    for batch, positions in shapes:
        q, k, v = (
            torch.randn(batch, positions, heads, WIDTH, device=device, dtype=torch.bfloat16)
            .transpose(1, 2)
            .requires_grad_()
            for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        taken = []
        for _ in range(3):
            _wait(device)
            started = time.perf_counter()
            y = attention(q, k, v)
            torch.autograd.grad(y, (q, k, v), torch.ones_like(y))
            _wait(device)
            taken.append(time.perf_counter() - started)
        uses.append(
            {"batch": batch, "positions": positions, "first_s": taken[0], "second_s": taken[1], "third_s": taken[2]}
        )
    row = emit("attention", name=name, uses=uses)
    print(row, flush=True)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
