"""`python -m benchmarks.training.pair`: our bare training step against Hugging Face's, in turn A B A B.

No launcher, data or checkpoints: only model, loss and optimizer, on random tokens. Every turn is its own process; times
are medians over the turns of a side, memory is the maximum. A side whose first loss differs did different work: it is
reported but not compared, and the command exits with 1. A side that cannot run is reported with the reason.
"""

import argparse
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.rows import tail

SIDES = ("ours", "hf", "liger", "unsloth")
FLOPS_FORMULA = "model FLOPs a token: 4 N for LoRA, 6 N for full fine-tuning, + 12 x layers x width x context"


def main() -> int:
    options, rest = parse()
    report: dict[str, Any] = {"kind": "pair", "arguments": rest, **machine(), "formula": FLOPS_FORMULA}

    def write(found: dict[str, Any]) -> None:
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(report | found, indent=2) + "\n", encoding="utf-8")

    turns = take_turns(
        options.sides, rest, turns=options.turns, limit_s=options.limit_s, after=lambda taken: write({"turns": taken})
    )
    if not turns.get("ours") or "failed" in turns["ours"][0]:
        raise SystemExit(f"ours failed: {turns['ours'][0]['failed'] if turns.get('ours') else 'not asked for'}")
    report |= compare(turns, loss_tolerance=options.loss_tolerance)
    table(report)
    write({})
    return 1 if report["unequal"] else 0


def take_turns(
    sides: Sequence[str],
    arguments: Sequence[str],
    *,
    turns: int,
    limit_s: float = 600.0,
    after: Callable[[dict[str, Any]], None] = lambda taken: None,
) -> dict[str, list[dict[str, Any]]]:
    """Every side `turns` times, A B A B. A side that failed is not retried; its record has `failed`. `after` is called
    with all turns after each one, so a crash keeps the earlier turns."""
    taken: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(turns):
        for side in sides:
            if any("failed" in turn for turn in taken[side]):
                continue
            taken[side].append(run(side, arguments, limit_s=limit_s))
            after(taken)
            last = taken[side][-1]
            if last.get("stderr"):
                print(last["stderr"], file=sys.stderr, flush=True)
            shown = last["failed"] if "failed" in last else f"{last['tokens_per_s']:10.1f} tokens/s"
            print(f"  {side:8} {shown}", flush=True)
    return taken


def run(side: str, arguments: Sequence[str], *, limit_s: float) -> dict[str, Any]:
    """A turn's figures, or `failed` (one line) with `stderr` (its last lines)."""
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.training.side", side, *arguments]
    try:
        done = subprocess.run(
            command,
            cwd=root,
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
            timeout=limit_s,
        )
    except subprocess.TimeoutExpired as cut:
        said = cut.stderr.decode(errors="replace") if isinstance(cut.stderr, bytes) else cut.stderr or ""
        return {"side": side, "failed": f"cut off after {limit_s:.0f} s", "stderr": tail(said)}
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no output"]
        return {"side": side, "failed": lines[-1][:300], "stderr": tail(done.stderr)}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def compare(turns: dict[str, list[dict[str, Any]]], *, loss_tolerance: float = 1e-3) -> dict[str, Any]:
    """Each side's figures, the ratios of ours to every side that did the same work, and the sides that did not."""
    failed = {side: taken[0]["failed"] for side, taken in turns.items() if taken and "failed" in taken[0]}
    sides = {
        side: {
            "tokens_per_s": statistics.median(turn["tokens_per_s"] for turn in taken),
            "step_s": statistics.median(turn["step_s"] for turn in taken),
            "mfu": statistics.median(turn["mfu"] for turn in taken) if taken[0]["mfu"] is not None else None,
            "peak_bytes": max(turn["peak_bytes"] for turn in taken),
            "peak_above_weights_bytes": max(turn["peak_above_weights_bytes"] for turn in taken),
            "first_loss": taken[0]["first_loss"],
            "parameters": taken[0]["parameters"],
        }
        for side, taken in turns.items()
        if taken and side not in failed
    }
    ours = sides["ours"]
    others = {side: row for side, row in sides.items() if side != "ours"}
    unequal = {
        side: f"first loss {row['first_loss']:.5f}, ours {ours['first_loss']:.5f}: not the same work"
        for side, row in others.items()
        if not math.isclose(row["first_loss"], ours["first_loss"], rel_tol=loss_tolerance)
    }
    ratios = {
        side: {
            "tokens_per_s": ours["tokens_per_s"] / row["tokens_per_s"],
            "peak": ours["peak_bytes"] / row["peak_bytes"],
            "peak_above_weights": ours["peak_above_weights_bytes"] / max(1, row["peak_above_weights_bytes"]),
        }
        for side, row in others.items()
        if side not in unequal
    }
    return {"sides": sides, "ratios": ratios, "unequal": unequal, "failures": failed, "turns": turns}


def table(report: dict[str, Any]) -> None:
    print(f"{'':8}{'tokens/s':>12}{'step s':>10}{'MFU':>7}{'peak MiB':>12}{'above weights':>16}{'first loss':>12}")
    for side, row in report["sides"].items():
        mib = 1 << 20
        mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
        print(
            f"{side:8}{row['tokens_per_s']:12.1f}{row['step_s']:10.3f}{mfu:>7}{row['peak_bytes'] / mib:12.0f}"
            f"{row['peak_above_weights_bytes'] / mib:16.0f}{row['first_loss']:12.5f}"
        )
    for side, ratios in report["ratios"].items():
        shown = ", ".join(f"{name} {value:.2f}" for name, value in ratios.items())
        print(f"ours / {side}: {shown}")
    for side, why in {**report["unequal"], **report["failures"]}.items():
        print(f"{side:8}{why}")


def machine() -> dict[str, Any]:
    import peft
    import transformers

    cuda = torch.cuda.is_available()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
    }


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training.pair",
        description=__doc__.partition("\n")[0],
        epilog="Other options go to each side: see benchmarks/training/side.py.",
    )
    parser.add_argument("--sides", nargs="+", default=["ours", "hf"], choices=SIDES)
    parser.add_argument("--turns", type=int, default=2, help="how often each side runs")
    parser.add_argument("--loss-tolerance", type=float, default=1e-3)
    parser.add_argument("--limit-s", type=float, default=600.0, help="a turn is cut off after this long")
    parser.add_argument("--json", type=Path)
    return parser.parse_known_args()


if __name__ == "__main__":
    sys.exit(main())
