"""Parity of every kernel on the device, in bf16: our error against fp64 may be at most twice eager's plus 1e-6.

    python -m benchmarks.kernels.parity [--tiny] [--json FILE]

Runs the Triton form at aligned, ragged and one-row lengths, checks that two runs give the same bits and that the
dropout mask on the device equals the CPU's. Different bits pass only where cuDNN's attention ran, whose backward pass
is not deterministic. A case that raises is a failure. Exits 1 on a failure.
"""

import argparse
import json
import math
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from ft_dist_kernels.dropout.op import keep_mask
from torch import Tensor

from benchmarks.kernels.__main__ import about
from benchmarks.kernels.cases import OPS, SMOLLM2, TINY, Model, cases_of
from benchmarks.kernels.harness import Case, Inputs, errors, step, upstream_for
from benchmarks.rows import emit, tail

RAGGED = Model("ragged", 1000, 2056, 4099, 6, 2, 72)
MODELS = (SMOLLM2, SMOLLM2._replace(gelu=True), RAGGED)
LENGTHS = (1, 37, 256)


def check(case: Case, tokens: int, device: str) -> dict[str, Any]:
    """One row: errors, whether two runs agree bit for bit, and the verdict."""
    row = {"op": case.op, "shape": case.label, "tokens": tokens}
    try:
        case.error_tokens = tokens
        error = errors(case, torch.bfloat16, device)
        inputs = case.make(tokens, torch.bfloat16, device)
        upstream = upstream_for(case.ours, inputs)
        once, again = (step(case.ours, inputs, upstream) for _ in range(2))
        same = all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
        cudnn = not same and ran_cudnn(case, inputs, upstream)
    except Exception as problem:  # one failing case must not stop the others
        trace = "".join(traceback.format_exception(problem))
        print(trace, flush=True)
        broken = {"failed": f"{type(problem).__name__}: {problem}"[:500], "traceback": tail(trace)}
        return {**row, "ours": math.nan, "eager": math.nan, "bit_equal": False, "passed": False, **broken}
    passed = (same or cudnn) and error["ours"] <= 2 * error["eager"] + 1e-6
    return {**row, **error, "bit_equal": same, "cudnn": cudnn, "passed": passed}


def ran_cudnn(case: Case, inputs: Inputs, upstream: list[Tensor]) -> bool:
    """Whether the profiler sees a cuDNN kernel in this case."""
    if not torch.cuda.is_available():
        return False
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step(case.ours, inputs, upstream)
        torch.cuda.synchronize()
    return any("cudnn" in event.name().lower() for event in profile.profiler.kineto_results.events())


def checks(*, tiny: bool = False) -> Iterator[tuple[Callable[[], Case], int]]:
    """(maker of a case, tokens) of every check."""
    for model in (TINY,) if tiny else MODELS:
        for op in OPS:
            for make in cases_of(model, max(LENGTHS)).get(op, ()):
                for tokens in LENGTHS:
                    yield make, tokens


def print_check(row: dict[str, Any]) -> None:
    bits = "same bits" if row["bit_equal"] else "cuDNN's bits" if row.get("cudnn") else "BITS DIFFER"
    print(
        f"{row['op']:21} {row['shape']:58} T={row['tokens']:<4} ours {row['ours']:.1e} eager {row['eager']:.1e} "
        f"{bits} {'ok' if row['passed'] else 'FAILED'}",
        flush=True,
    )


def same_mask(device: str) -> bool:
    return all(
        torch.equal(keep_mask(257, 131, p=p, seed=seed), keep_mask(257, 131, p=p, seed=seed, device=device).cpu())
        for p, seed in ((0.1, 0), (0.5, -9))
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.parity", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="one small shape, to try the command")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    rows = []
    for make, tokens in checks(tiny=options.tiny):
        rows.append(check(make(), tokens, options.device))
        emit("parity", **rows[-1])
        print_check(rows[-1])
    mask = same_mask(options.device)
    emit("parity mask", equal=mask)
    failed = [row for row in rows if not row["passed"]]
    print(f"{len(rows)} checks, {len(failed)} failed; dropout mask {'equal to' if mask else 'DIFFERS from'} the CPU's")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        report = about(options.device) | {"mask_equal": mask, "rows": rows}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if failed or not mask else 0


if __name__ == "__main__":
    sys.exit(main())
