"""Every kernel against Hugging Face's and PEFT's form, paired in one run: error, time, peak memory.

    python -m benchmarks.kernels [--device cpu|cuda] [--ops OP ...] [--dtype bf16|fp32|fp16] [--quick] [--json FILE]

On CUDA, also the share of the roofline: the time that the formula's bytes and FLOPs need at the copy and matmul rates
measured at the start, divided by ours. Runs from a source tree that is not installed.
"""

import argparse
import datetime
import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels.cases import OPS, cases
from benchmarks.kernels.harness import ceilings, measure
from benchmarks.rows import emit, guarded

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
PACKAGES = ("torch", "triton", "transformers", "peft", "liger_kernel", "cut-cross-entropy")


def about(device: str) -> dict[str, Any]:
    """Date, device and versions, without which a figure means nothing."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    name = torch.cuda.get_device_name() if device == "cuda" else torch.cpu.get_capabilities().get("cpu_name", "CPU")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": name,
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def print_row(row: dict[str, Any]) -> None:
    print(
        f"{row['op']:21} {row['shape']:58} error {row['error']['ours']:.1e} (eager {row['error']['eager']:.1e})  "
        f"{1e3 * row['seconds']['ours']:8.3f} ms  x{row['time_ratio']:.2f} time  x{row['memory_ratio']:.2f} memory",
        end="",
    )
    if "over_floor" in row:
        print(f"  {100 * row['over_floor']:+.1f}% over the frozen products", end="")
    if "roofline_share" in row:
        print(f"  {100 * row['roofline_share']:.0f}% of roofline [{row['formula']}]", end="")
    print()
    for name, seconds in row["seconds"].items():
        if name not in ("ours", "eager", "floor"):
            memory = row["peak_bytes"][name] / max(row["peak_bytes"]["eager"], 1)
            print(f"{'':21}   {name}: {1e3 * seconds:.3f} ms, x{memory:.2f} memory")
    for name, problem in row["peers_failed"].items():
        print(f"{'':21}   {name} failed: {problem}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ops", nargs="*", choices=OPS, default=list(OPS))
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: bf16 on a GPU, fp32 on CPU")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and rounds")
    parser.add_argument("--tiny", action="store_true", help="one small shape, to try the command")
    parser.add_argument("--no-peers", action="store_true", help="only ours and eager")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda needs a GPU, and torch finds none. Use --device cpu.", file=sys.stderr)
        return 2
    dtype = DTYPES[options.dtype or ("bf16" if options.device == "cuda" else "fp32")]
    report = about(options.device)
    limits = ceilings(options.device)
    print(f"{report['device']}, {report['versions']}, {report['threads']} threads, {dtype}")
    for name, value in limits.items():
        print(f"measured ceiling {name}: {value:.3e}")
    rows: list[dict[str, Any]] = []
    failed = 0
    rounds = 3 if options.quick or options.tiny or options.device == "cuda" else 7
    for case in cases(options.device, tuple(options.ops), quick=options.quick, tiny=options.tiny):
        if options.no_peers:
            case.peers.clear()
        with guarded("op", op=case.op, shape=case.label) as problems:
            try:
                rows.append(measure(case, dtype, options.device, limits, rounds=rounds))
            except torch.OutOfMemoryError:  # eager's logits over a large vocabulary, on a small device
                torch.cuda.empty_cache()
                print(f"{case.op:21} {case.label:58} does not fit on this device for every contestant")
                continue
            emit("op", **rows[-1])
            print_row(rows[-1])
        failed += len(problems)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report | {"ceilings": limits, "rows": rows}, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
