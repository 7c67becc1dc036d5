"""`python -m benchmarks.checkpoint`: stall, total time, bytes and memory of a save, paired round by round in one run.

Three contestants save the same training state after one step: our background writer, DeepSpeed's `save_checkpoint`
(without frozen weights, like ours) and torch DCP's `async_save` of our fragments. Reports medians over the rounds; the
first round is also reported because it allocates the buffers. A step follows each save; `cost` is the time that both
take beyond a step alone; `total` ends when the files exist. Exits 1 if a target is missed.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
STALL_TARGET = 0.1
"""Our stall as a share of DeepSpeed's"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--methods", nargs="+", default=["full", "lora"])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="Where the checkpoints go [default: a temporary folder]")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report: dict[str, Any] = {"model": options.model, "ranks": options.ranks, "stage": options.stage, **machine()}
    for method in options.methods:
        report[method] = measure(options, method)
        table(method, report[method])
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    missed = [line for method in options.methods for line in report[method]["missed"]]
    print("\n".join(missed), file=sys.stderr)
    return 1 if missed else 0


def measure(options: argparse.Namespace, method: str) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=options.folder))
    config = [
        "smoke",
        f"model.path={options.model}",
        f"method.kind={method}",
        f"engine.zero_stage={options.stage}",
        "data.eval=[]",
        "data.max_length=512",
        "data.too_long=truncate",
        "data.packing=false",
        f"batch.global_rows={options.ranks}",
        "checkpoint.interval_steps=0",
        "checkpoint.keep=1",
        "checkpoint.resume=never",
    ]
    try:
        found = ranks("save", folder, options.rounds, [*config, f"output_dir={folder}/ours"], options.ranks)
        other = options.ranks + 1 if options.ranks == 1 else options.ranks - 1
        elsewhere = ranks("load", folder, 1, [*config, f"output_dir={folder}/other"], other)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sides = {name: summary(found[name]) for name in ("ours", "deepspeed", "dcp")}
    loads = found["load_s"] | {"ours_other_world": elsewhere["load_s"], "other_world": other}
    return {"sides": sides, "load_s": loads, "rounds": found, "missed": missed_targets(method, sides)}


def summary(rounds: list[dict[str, float]]) -> dict[str, float]:
    keys = ("stall_s", "cost_s", "total_s", "bytes", "extra_bytes")
    medians = {key: statistics.median(taken[key] for taken in rounds) for key in keys}
    most = max(taken["extra_bytes"] for taken in rounds)
    return medians | {"first_stall_s": rounds[0]["stall_s"], "extra_bytes": most}


def missed_targets(method: str, sides: dict[str, dict[str, float]]) -> list[str]:
    ours, theirs = sides["ours"], sides["deepspeed"]
    missed = []
    if ours["stall_s"] > STALL_TARGET * theirs["stall_s"]:
        missed.append(f"{method}: stall {ours['stall_s']:.3f} s is over a tenth of {theirs['stall_s']:.3f} s")
    if ours["bytes"] > theirs["bytes"]:
        missed.append(f"{method}: {ours['bytes']:.0f} bytes are more than {theirs['bytes']:.0f}")
    return missed


def ranks(what: str, folder: Path, rounds: int, config: list[str], size: int) -> dict[str, Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.checkpoint.side", what, str(folder), str(rounds)]
    workers = [
        subprocess.Popen(
            [*command, *config],
            cwd=ROOT,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    outputs = [worker.communicate()[0] for worker in workers]
    for worker, output in zip(workers, outputs, strict=True):
        if worker.returncode != 0:
            raise SystemExit(f"{what} failed:\n{output[-3000:]}")
    line = next(line for line in outputs[0].splitlines() if line.startswith("RESULT "))
    return dict(json.loads(line.removeprefix("RESULT ")))


def table(method: str, found: dict[str, Any]) -> None:
    print(f"\n{method:10} {'stall s':>9} {'first':>9} {'cost s':>9} {'total s':>9} {'MB':>10} {'extra MB':>10}")
    for name, side in found["sides"].items():
        print(
            f"{name:10} {side['stall_s']:9.3f} {side['first_stall_s']:9.3f} {side['cost_s']:9.3f} "
            f"{side['total_s']:9.3f} "
            f"{side['bytes'] / 1e6:10.1f} {side['extra_bytes'] / 1e6:10.1f}"
        )
    loads = ", ".join(f"{name} {value:.2f}" for name, value in found["load_s"].items())
    print(f"load s: {loads}", flush=True)


def machine() -> dict[str, str]:
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "deepspeed": __import__("importlib.metadata").metadata.version("deepspeed"),
    }


if __name__ == "__main__":
    sys.exit(main())
