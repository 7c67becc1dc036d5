"""`make bench-quick`: guards against slowdowns, in under three minutes.

Ours against Hugging Face + PEFT, paired, in LoRA and full fine-tuning of the SmolLM2-135M shape; and the start of the
command against the import of torch. Keeps ratios, never times, which mean nothing on a busy or different machine. A
ratio that is more than TOLERANCE worse than the last one on the same machine gives exit code 1.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.training.pair import compare, machine, take_turns
from ft_dist.bench.report import cpu_name

RESULTS = Path(__file__).resolve().parents[1] / "results"
WORK = ["--model", "smollm2-135m", "--rows", "1", "--tokens", "256", "--labelled", "0.5", "--steps", "3"]
TOLERANCE = 0.2
"""Relative; two paired turns on a shared machine differ by less"""
HIGHER_IS_BETTER = ("tokens_per_s",)


def main() -> int:
    options = parse()
    ratios: dict[str, float] = {}
    for method in ("lora", "full"):
        sides = ["--method", method, "--device", options.device, "--dtype", options.dtype, *WORK]
        report = compare(take_turns(["ours", "hf"], sides, turns=options.turns))
        ratios |= {f"{method}_{name}": round(value, 3) for name, value in report["ratios"]["hf"].items()}
    ratios["help_over_import_torch"] = round(start_ratio(), 3)
    described = machine() | {"kind": "quick", "machine": f"{cpu_name()}, {os.cpu_count()} cores"}
    record = {
        **described,
        "work": [*WORK, "--dtype", options.dtype],
        "against": "Hugging Face + PEFT",
        "ratios": ratios,
    }
    for name, value in ratios.items():
        print(f"{name:32}{value:8.2f}")
    before = newest(options.results, record)
    name = f"{record['date']}-{'gpu' if options.device == 'cuda' else 'cpu'}-quick.json"
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / name).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    worse = regressions(before["ratios"], ratios) if before else []
    for line in worse:
        print(line, file=sys.stderr)
    return 1 if worse else 0


def start_ratio() -> float:
    """Time of `ft-dist --help` over the time of importing torch, medians of three alternating runs."""
    sides = {"help": ["-m", "ft_dist.cli", "--help"], "torch": ["-c", "import torch"]}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(3):
        for side, arguments in sides.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
            seconds[side].append(time.perf_counter() - started)
    return statistics.median(seconds["help"]) / statistics.median(seconds["torch"])


def newest(results: Path, record: dict[str, Any]) -> dict[str, Any] | None:
    """The last record with the same machine, device and work."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*-quick.json"))]
    same = [one for one in found if all(one.get(key) == record[key] for key in ("machine", "device", "work"))]
    return same[-1] if same else None


def regressions(before: dict[str, float], now: dict[str, float]) -> list[str]:
    """One line per ratio that got worse by more than TOLERANCE."""
    lines = []
    for name in sorted(set(before) & set(now)):
        change = now[name] / before[name]
        worse = change < 1 - TOLERANCE if name.endswith(HIGHER_IS_BETTER) else change > 1 + TOLERANCE
        if worse:
            lines.append(f"{name}: {now[name]:.2f}, was {before[name]:.2f}: more than {TOLERANCE:.0%} worse")
    return lines


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training.quick", description=__doc__.partition("\n")[0])
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
