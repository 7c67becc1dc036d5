"""`python -m benchmarks.learning`: LoRA's results on an FP8 base and on a bf16 base, seed by seed.

    python -m benchmarks.learning [--tasks quickstart banking77] [--seeds 3] [--steps N]
                                  [--banking77 DIR] [--json FILE] [--work DIR]

Both bases run for every task and seed, with the same samples in the same order. Each run is scored on the weights it
trained on; the adapter of an FP8 run is also scored on the model's own weights, which is how `ft-dist chat`, `evaluate`
and `export` load it. Differences are compared with the spread of the bf16 runs over seeds. On CPU, FP8 is emulated. The
file is written after every run; runs already in --work are reused.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BASES = {"bf16": [], "fp8": ["model.base_dtype=fp8"]}
OWN = "fp8, on own weights"
CATEGORIES, TEST_ROWS = 10, 100
"""Banking77: the first categories by name; rows of the held-out set to score, evenly spaced"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning")
    parser.add_argument("--tasks", nargs="+", default=["quickstart", "banking77"], choices=["quickstart", "banking77"])
    parser.add_argument("--banking77", type=Path, help="folder with train.csv and test.csv (text, category)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path, help="keep runs here (default: a temporary folder)")
    options = parser.parse_args()
    if "banking77" in options.tasks and not options.banking77:
        parser.error("the task banking77 needs --banking77 DIR")
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        rows: list[dict[str, Any]] = []
        for seed in range(options.seeds):
            for task in options.tasks:
                for base in BASES:
                    rows += measure(task, base, seed, options, work)
                    if options.json:
                        write(options.json, rows, options.steps)
        print(table(rows))
    return 0


def measure(task: str, base: str, seed: int, options: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """The rows of one run: scored as trained and, for an adapter trained on FP8, also on the model's own weights."""
    folder = work / f"{task}-{base}-{seed}"
    recipe = [
        "quickstart",
        "model.dtype=bf16",
        *BASES[base],
        f"seed={seed}",
        f"optim.max_steps={options.steps}",
        "optim.epochs=100",
        "evaluate.before=false",
        f"evaluate.max_samples={TEST_ROWS}",
        "checkpoint.interval_steps=0",
        f"output_dir={folder}",
    ]
    if task == "banking77":
        train, test = subset(options.banking77, work)
        columns = {"prompt": "text", "completion": "category"}
        recipe += [
            f"data.train={json.dumps([{'path': str(train), 'columns': columns}])}",
            f"data.eval={json.dumps([{'path': str(test), 'columns': columns}])}",
            "evaluate.max_new_tokens=16",
        ]
    if not (folder / "final").is_dir():
        command("train", *recipe)
    scores = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["after"]
    row = {"task": task, "base": base, "seed": seed, "steps": options.steps}
    rows = [row | score(scores)]
    if base == "fp8":
        tokens = "16" if task == "banking77" else "5"
        again = command("eval", str(folder), "--max-new-tokens", tokens, "--max-samples", str(TEST_ROWS), "--json")
        rows.append(row | {"base": OWN} | score(json.loads(again)))
    for each in rows:
        print(json.dumps(each), flush=True)
    return rows


def score(scores: dict[str, Any]) -> dict[str, Any]:
    return {key: scores[key] for key in ("loss", "accuracy", "answered")}


def command(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "ft_dist.cli", *arguments], cwd=ROOT, env=os.environ, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"ft-dist {' '.join(arguments)}: exit {done.returncode}\n{done.stderr[-2000:]}")
    return done.stdout


def subset(banking77: Path, work: Path) -> tuple[Path, Path]:
    """CSV files of the first categories; the test set keeps a few rows of each."""
    paths = []
    for name, most in (("train", 10**6), ("test", TEST_ROWS // CATEGORIES)):
        with (banking77 / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        kept: list[dict[str, str]] = []
        for category in sorted({row["category"] for row in rows})[:CATEGORIES]:
            kept += [row for row in rows if row["category"] == category][:most]
        work.mkdir(parents=True, exist_ok=True)
        paths.append(work / f"banking77-{name}.csv")
        with paths[-1].open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["text", "category"])
            writer.writeheader()
            writer.writerows(kept)
    return paths[0], paths[1]


def table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds, their spread, and the mean difference from bf16 at the same seed."""
    lines = [f"{'task':12}{'base':22}{'seeds':>6}{'loss':>16}{'diff':>9}{'accuracy':>18}{'diff':>9}"]
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = {(row["base"], row["seed"]): row for row in rows if row["task"] == task}
        for base in dict.fromkeys(base for base, _ in mine):
            seeds = [seed for other, seed in mine if other == base and ("bf16", seed) in mine]
            cells = [f"{task:12}{base:22}{len(seeds):>6}"]
            for key in ("loss", "accuracy"):
                values = [mine[base, seed][key] for seed in seeds]
                differences = [mine[base, seed][key] - mine["bf16", seed][key] for seed in seeds]
                spread = statistics.stdev(values) if len(values) > 1 else float("nan")
                cells.append(f"{statistics.mean(values):>9.4f} ±{spread:.3f}{statistics.mean(differences):>+10.4f}")
            lines.append("".join(cells))
    return "\n".join(lines)


def write(path: Path, rows: list[dict[str, Any]], steps: int) -> None:
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu, FP8 emulated"
    head = {
        "kind": "learning",
        "date": time.strftime("%Y-%m-%d"),
        "device": device,
        "torch": torch.__version__,
        "steps": steps,
    }
    path.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
