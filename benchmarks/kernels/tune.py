"""Block sizes for this machine's GPU: times every candidate of an op's table at the shapes of well-known models.

    python -m benchmarks.kernels.tune [--ops OP ...] [--json FILE]

Prints the best entry of each table next to the one checked in. Kernels never tune themselves during training: entries
are part of the source, so the same run gives the same bits on every machine of a kind.
"""

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.kernels.__main__ import about
from benchmarks.kernels.cases import cases
from benchmarks.kernels.harness import Case, medians_s, step, upstream_for


class Entry(NamedTuple):
    """One entry of a table: `table[key]` holds one of `candidates` (or the checked-in value)."""

    op: str
    name: str
    table: dict[Any, Any]
    key: Any
    candidates: list[Any]


def entries(device: torch.device, ops: list[str]) -> Iterator[Entry]:
    """Every entry that the benchmark's shapes reach on this chip."""
    from ft_dist_kernels.chips import chip_of
    from ft_dist_kernels.cross_entropy import kernels as linear_cross_entropy_kernels
    from ft_dist_kernels.glu import kernels as glu_kernels
    from ft_dist_kernels.lora import blocks as lora
    from ft_dist_kernels.rms_norm import kernels as rms_norm_kernels
    from ft_dist_kernels.rope import kernels as rope_kernels

    chip = chip_of(device)
    platform = "hip" if torch.version.hip else "cuda"
    tiles = list(itertools.product((1024, 2048, 4096, 8192), (4, 8, 16)))
    found = [
        Entry("glu", "TILES", glu_kernels.TILES, chip, tiles),
        Entry("rope", "TILES", rope_kernels.TILES, chip, tiles),
        Entry("rms_norm", "THREADS", rms_norm_kernels.THREADS, chip, [(v, 32) for v in (4, 8, 16, 32)]),
        Entry(
            "linear_cross_entropy",
            "BLOCKS",
            linear_cross_entropy_kernels.BLOCKS,
            chip,
            list(itertools.product((4096, 8192, 16384), (8, 16, 32))),
        ),
    ]
    shapes = itertools.product((32, 64, 128), (64, 128, 256), (4, 8), (2, 3, 4))
    blocks = [lora.Blocks(*shape) for shape in shapes]
    for name, table in (
        ("DOWN", lora.DOWN),
        ("UP_BACKWARD", lora.UP_BACKWARD),
        ("DOWN_BACKWARD", lora.DOWN_BACKWARD),
    ):
        first_ranks = min(table[platform])
        found.append(Entry("lora_linear", name, table[platform], first_ranks, blocks))
    return (entry for entry in found if entry.op in ops)


def best(entry: Entry, seconds: Callable[[], float]) -> tuple[Any, dict[str, float]]:
    """The fastest candidate by `seconds()`, and the times of all that ran; restores the table.

    A candidate that does not fit on the chip raises at launch and is skipped.
    """
    checked_in = entry.table[entry.key]
    times: dict[str, float] = {}
    fastest, least = checked_in, math.inf
    try:
        for candidate in dict.fromkeys([checked_in, *entry.candidates]):
            entry.table[entry.key] = candidate
            try:
                taken = seconds()
            except Exception as problem:  # too much shared memory, too many registers: any of Triton's errors
                print(f"    {candidate}: {type(problem).__name__}")
                continue
            times[str(tuple(candidate))] = taken
            if taken < least:
                fastest, least = candidate, taken
    finally:
        entry.table[entry.key] = checked_in
    return fastest, times


def time_of(op_cases: list[Case], device: str) -> Callable[[], float]:
    """Geometric mean, over the op's cases, of the seconds of a forward and backward pass in bf16."""
    runs = []
    for case in op_cases:
        inputs = case.make(case.tokens, torch.bfloat16, device)
        upstream = upstream_for(case.ours, inputs)
        runs.append(lambda case=case, inputs=inputs, upstream=upstream: step(case.ours, inputs, upstream))

    def seconds() -> float:
        logs = [math.log(medians_s({"ours": run}, device, 1)["ours"]) for run in runs]
        return math.exp(sum(logs) / len(logs))

    return seconds


def main() -> int:
    ops = ["glu", "rope", "rms_norm", "linear_cross_entropy", "lora_linear"]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--ops", nargs="*", choices=ops, default=ops)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("tuning needs a GPU, and torch finds none.", file=sys.stderr)
        return 2
    report: dict[str, Any] = {**about("cuda"), "entries": []}
    for entry in entries(torch.device("cuda"), options.ops):
        names = (entry.op,) if entry.op != "glu" else ("swiglu", "geglu")
        found, times = best(entry, time_of(list(cases("cuda", names, quick=True)), "cuda"))
        checked_in = entry.table[entry.key]
        gain = times.get(str(tuple(checked_in)), math.nan) / min(times.values())
        print(f"{entry.op} {entry.name}[{entry.key!r}]: {tuple(found)} (checked in: {tuple(checked_in)}, x{gain:.3f})")
        report["entries"].append(
            {"op": entry.op, "table": entry.name, "key": entry.key, "best": list(found), "seconds": times}
        )
        torch.cuda.empty_cache()
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
