"""One optimizer step as recorded in metrics.jsonl, and its line on the console."""

import math
import time
from typing import Any

import torch

from ft_dist.data.stream.batch import Prefetched
from ft_dist.engine.step import Engine, StepResult
from ft_dist.observe.console import Console
from ft_dist.plan.gpu import peak_flops
from ft_dist.resources import flops_per_token


class Clock:
    """Splits wall time into consecutive laps."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        elapsed, self._last = now - self._last, now
        return elapsed


def step_record(
    batch: Prefetched,
    result: StepResult,
    *,
    step: int,
    learning_rate: float,
    waited_s: float,
    step_s: float,
    checkpoint_stall_s: float,
    peak_bytes: int,
) -> dict[str, Any]:
    """The line of `step` in metrics.jsonl."""
    return {
        "step": step,
        "loss": result.loss if math.isfinite(result.loss) else None,
        "lr": learning_rate,
        "grad_norm": None if result.skipped else result.grad_norm,
        "labelled_tokens": batch.batch.labelled_tokens,
        "real_tokens": batch.batch.real_tokens,
        "padded_tokens": int(result.sums.padded_tokens),
        "computed_tokens": int(result.sums.computed_tokens),
        "tokens_per_s": round(batch.batch.real_tokens / (step_s + waited_s), 3),
        "step_s": round(step_s, 6),
        "data_wait_s": round(waited_s, 6),
        "checkpoint_stall_s": round(checkpoint_stall_s, 6),
        "peak_memory_bytes": peak_bytes,
        "epoch": round(batch.batch.progress, 6),
        "samples_seen": batch.state_after["samples_seen"],
        **result.metrics,
    }


def print_step(
    console: Console, record: dict[str, Any], engine: Engine, *, seconds: float, total_steps: int, last: bool
) -> None:
    """Print a step that took `seconds`, including the wait for data; with `last` always."""
    eta_s = (total_steps - record["step"]) * seconds
    mfu = model_flops_utilisation(record, engine, seconds)
    console.step(record, total_steps=total_steps, eta_s=eta_s, mfu=mfu, last=last)


def device_peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of `device` in FLOP/s, or None if unknown."""
    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def model_flops_utilisation(record: dict[str, Any], engine: Engine, seconds: float) -> float | None:
    """Share of the GPUs' peak FLOP/s that the step needed; None on devices of unknown peak.

    Tokens that a shared prefix or the last label makes unnecessary do not count as needed.
    """
    peak = device_peak_flops(engine.world.device)
    if not peak:
        return None
    per_token = flops_per_token(total_parameters=engine.total_parameters, trainable_share=engine.trainable_share)
    needed = min(record["real_tokens"], record["computed_tokens"])
    return needed * per_token / seconds / (peak * engine.world.size)
