"""`python -m benchmarks.data --json F`: preparing, packing, loading and seeking, each paired with a baseline.

Preparing is compared with `datasets.map` (same tokenizer and processes) and with the tokenizer alone; packing with
TRL's best-fit decreasing. Memory is measured at growing sizes and seeks at growing positions; neither should grow.
"""

import argparse
import datetime
import json
import os
import platform
from pathlib import Path

from benchmarks.data.measure import ROOT, fullness, loader, memory, rates, sample_lengths, seek

POSITIONS = (10, 10**6, 10**9)


def main() -> None:
    options = parse()
    report = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "workers": options.workers,
    }
    chosen = options.only or ["prepare", "memory", "packing", "loader", "seek"]
    if "prepare" in chosen:
        report["prepare"] = rates(options.rate_mb, options.workers)
        for side, result in report["prepare"].items():
            print(f"prepare  {side:16} {result['tokens_per_s']:12,.0f} tokens/s", flush=True)
    if "memory" in chosen:
        report["memory"] = [memory(size, options.workers) for size in options.memory_mb]
        for result in report["memory"]:
            print(f"memory   {result['input_mb']:8,} MB input {result['peak_mb']:8,} MB at most", flush=True)
    if "packing" in chosen:
        report["packing"] = {name: fullness(sizes) for name, sizes in sample_lengths(options.shared).items()}
        for name, sides in report["packing"].items():
            print(f"packing  {name:16} ours {sides['ours']:.2%}, TRL bfd {sides['trl_bfd']:.2%}", flush=True)
    if "loader" in chosen:
        report["loader"] = loader(options.rate_mb, batches=40)
        print(f"loader   {report['loader']['tokens_per_s']:,.0f} tokens/s", flush=True)
    if "seek" in chosen:
        seek(0)  # imports and caches
        report["seek"] = {str(position): min(seek(position) for _ in range(5)) for position in POSITIONS}
        for position, seconds in report["seek"].items():
            print(f"seek     to {int(position):13,} {seconds * 1e3:8.1f} ms", flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="F", help="also write the figures to F")
    parser.add_argument("--only", nargs="+", choices=["prepare", "memory", "packing", "loader", "seek"])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rate-mb", type=int, default=50, help="input of prepare and loader")
    parser.add_argument(
        "--memory-mb", type=int, nargs="+", default=[1000, 4000], help="inputs whose peak memory is measured"
    )
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared" / "data", help="gsm8k/ and banking77/")
    return parser.parse_args()


if __name__ == "__main__":
    main()
