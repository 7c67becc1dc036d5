"""`python -m benchmarks.training`: a training step of ours against Hugging Face + PEFT, paired A B A B in one run.

Every turn is a process of its own; times are medians over all turns of a side, memory the largest. A first loss that
differs means unequal work and ends the run with exit code 1.
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
from pathlib import Path
from typing import Any

import torch

FLOPS_FORMULA = "model FLOPs a token: 4 N for LoRA, 6 N for full fine-tuning (attention left out)"


def main() -> int:
    options, rest = parse()
    turns: dict[str, list[dict[str, Any]]] = {"ours": [], "hf": []}
    for _ in range(options.turns):
        for side in turns:
            turns[side].append(run(side, rest))
            print(f"  {side:5} {turns[side][-1]['tokens_per_s']:10.1f} tokens/s", flush=True)
    losses = [turns[side][0]["first_loss"] for side in turns]
    if not math.isclose(*losses, rel_tol=options.loss_tolerance):
        print(f"first losses differ: ours {losses[0]}, Hugging Face {losses[1]}: not the same work", file=sys.stderr)
        return 1
    report = {"arguments": rest, **machine(), "formula": FLOPS_FORMULA, **compare(turns)}
    table(report)
    if options.json:
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n")
    return 0


def run(side: str, arguments: list[str]) -> dict[str, Any]:
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.training.side", side, *arguments]
    done = subprocess.run(
        command, cwd=root, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(turns: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    sides = {
        side: {
            "tokens_per_s": statistics.median(turn["tokens_per_s"] for turn in taken),
            "step_s": statistics.median(turn["step_s"] for turn in taken),
            "peak_bytes": max(turn["peak_bytes"] for turn in taken),
            "peak_above_weights_bytes": max(turn["peak_above_weights_bytes"] for turn in taken),
            "first_loss": taken[0]["first_loss"],
            "parameters": taken[0]["parameters"],
        }
        for side, taken in turns.items()
    }
    ours, theirs = sides["ours"], sides["hf"]
    ratios = {
        "tokens_per_s": ours["tokens_per_s"] / theirs["tokens_per_s"],
        "peak": ours["peak_bytes"] / theirs["peak_bytes"],
        "peak_above_weights": ours["peak_above_weights_bytes"] / theirs["peak_above_weights_bytes"],
    }
    return {"sides": sides, "ratios": ratios, "turns": turns}


def table(report: dict[str, Any]) -> None:
    print(f"{'':8}{'tokens/s':>12}{'step s':>10}{'peak MiB':>12}{'above weights':>16}{'first loss':>12}")
    for side, row in report["sides"].items():
        mib = 1 << 20
        print(
            f"{side:8}{row['tokens_per_s']:12.1f}{row['step_s']:10.3f}{row['peak_bytes'] / mib:12.0f}"
            f"{row['peak_above_weights_bytes'] / mib:16.0f}{row['first_loss']:12.5f}"
        )
    ratios = report["ratios"]
    print(f"{'ratio':8}{ratios['tokens_per_s']:12.2f}{'':10}{ratios['peak']:12.2f}{ratios['peak_above_weights']:16.2f}")


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
        prog="python -m benchmarks.training", epilog="Other options go to each side: see benchmarks/training/side.py."
    )
    parser.add_argument("--turns", type=int, default=2, help="times that each side runs")
    parser.add_argument("--loss-tolerance", type=float, default=1e-3)
    parser.add_argument("--json")
    return parser.parse_known_args()


if __name__ == "__main__":
    sys.exit(main())
