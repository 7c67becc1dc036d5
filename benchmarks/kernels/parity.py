"""Parity of every kernel on the device, in bf16: ours may be no further from fp64 truth than twice eager plus 1e-6.

    python -m benchmarks.kernels.parity [--json FILE]

Runs the Triton form at aligned, ragged and one-row lengths, checks that two runs give the same bits, and that the
dropout mask on the device is the CPU's. Exits 1 on a failure.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from ft_dist_kernels.dropout import keep_mask

from benchmarks.kernels.__main__ import about
from benchmarks.kernels.cases import OPS, SMOLLM2, Model, cases_of
from benchmarks.kernels.harness import Case, errors, step, upstream_for

RAGGED = Model("ragged", 1000, 2056, 4099, 6, 2, 72)
LENGTHS = (1, 37, 256)


def failure(case: Case, tokens: int, device: str) -> dict[str, Any]:
    case.error_tokens = tokens
    error = errors(case, torch.bfloat16, device)
    inputs = case.make(tokens, torch.bfloat16, device)
    upstream = upstream_for(case.ours, inputs)
    once, again = (step(case.ours, inputs, upstream) for _ in range(2))
    same = all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    passed = same and error["ours"] <= 2 * error["eager"] + 1e-6
    return {"op": case.op, "shape": case.label, "tokens": tokens, **error, "bit_equal": same, "passed": passed}


def same_mask(device: str) -> bool:
    return all(
        torch.equal(keep_mask(257, 131, p=p, seed=seed), keep_mask(257, 131, p=p, seed=seed, device=device).cpu())
        for p, seed in ((0.1, 0), (0.5, -9))
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.parity", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    rows = []
    for model in (SMOLLM2, SMOLLM2._replace(gelu=True), RAGGED):
        for op in OPS:
            for make in cases_of(model, max(LENGTHS)).get(op, ()):
                for tokens in LENGTHS:
                    rows.append(failure(make(), tokens, options.device))
    mask = same_mask(options.device)
    for row in rows:
        verdict = "ok" if row["passed"] else "FAILED"
        print(
            f"{row['op']:21} {row['shape']:58} T={row['tokens']:<4} ours {row['ours']:.1e} eager {row['eager']:.1e} "
            f"{'same bits' if row['bit_equal'] else 'BITS DIFFER'} {verdict}"
        )
    failed = [row for row in rows if not row["passed"]]
    print(f"{len(rows)} checks, {len(failed)} failed; dropout mask {'equal to' if mask else 'DIFFERS from'} the CPU's")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        report = about(options.device) | {"mask_equal": mask, "rows": rows}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if failed or not mask else 0


if __name__ == "__main__":
    sys.exit(main())
