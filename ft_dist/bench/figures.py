"""Medians, model FLOP utilisation and shares of time, from what the ranks recorded."""

import statistics
from typing import Any

from ft_dist.bench.spec import Spec
from ft_dist.resources import flops_per_token

PHASES = ("data", "forward", "backward", "optimizer", "communication", "checkpoint", "other")

FORMULA = (
    "model FLOPs per token = N (4 + 2 x trainable share) + 12 x layers x heads x head size x context: 4 N for LoRA, "
    "6 N for full fine-tuning; context is the mean number of tokens a token attends to; recomputation does not count, "
    "and a token shared by several samples counts once"
)


def figures(spec: Spec, seen: dict[str, Any]) -> dict[str, Any]:
    """One flat record per measurement: rates of real and labelled tokens, never of padding."""
    timed = seen["records"][spec.warmup : spec.warmup + spec.steps]
    seconds = [record["step_s"] + record["data_wait_s"] for record in timed]
    step_s = statistics.median(seconds)
    rates = {
        f"{kind}_tokens_per_s": statistics.median(
            record[f"{kind}_tokens"] / span for record, span in zip(timed, seconds, strict=True)
        )
        for kind in ("real", "labelled")
    }
    per_token = flops_per_token(total_parameters=seen["parameters"], trainable_share=seen["trainable_share"])
    needed_tokens_per_s = statistics.median(
        min(record["real_tokens"], record["computed_tokens"]) / span
        for record, span in zip(timed, seconds, strict=True)
    )
    per_token += 12 * seen["attention_width"] * seen["context"]
    world = seen["world_size"]
    return {
        **spec.settings,
        **rates,
        "step_s": step_s,
        "mfu": needed_tokens_per_s * per_token / (seen["peak_flops"] * world),
        "flops_a_token": per_token,
        "peak_flops": seen["peak_flops"],
        "peak_flops_source": "measured matrix product" if seen["peak_flops_measured"] else "data sheet, dense bf16",
        "peak_bytes": seen["peak_bytes"],
        "padded_share": sum(r["padded_tokens"] for r in timed)
        / sum(r["padded_tokens"] + r["real_tokens"] for r in timed),
        "parameters": seen["parameters"],
        "world_size": world,
        "zero_stage": seen["zero_stage"],
        "kernels": seen["kernels"],
        "device": seen["device"],
        "versions": seen["versions"],
        "time": _time(spec, seen),
        "checkpoint_s": seen.get("checkpoint_s"),
    }


def _time(spec: Spec, seen: dict[str, Any]) -> dict[str, float]:
    """Seconds per step by phase, medians over the steps whose phases were timed.

    A timed checkpoint counts as the time for which it stalls training.
    """
    by_step = seen["phases"]
    if not by_step:
        return {}
    records = seen["records"][spec.warmup + spec.steps :]

    def median(phase: str) -> float:
        return statistics.median(taken.get(phase, 0.0) for taken in by_step)

    found = {phase: median(phase) for phase in ("forward", "backward", "optimizer", "communication")}
    whole = statistics.median(record["step_s"] for record in records)
    found["other"] = max(0.0, whole - sum(found.values()))
    found["data"] = statistics.median(record["data_wait_s"] for record in records)
    if "checkpoint_stall_s" in seen:
        found["checkpoint"] = seen["checkpoint_stall_s"]
    return {phase: found[phase] for phase in PHASES if phase in found}


def communication_share(record: dict[str, Any]) -> float:
    """The share of a step, without a checkpoint, that communication takes."""
    time = {phase: seconds for phase, seconds in record["time"].items() if phase != "checkpoint"}
    return time.get("communication", 0.0) / max(1e-12, sum(time.values()))
