"""`python -m benchmarks.training`: what `ft-dist bench` measures; with `--peers`, ours and the peers in turn; with
`--curves`, TRL's loss and ours, step by step.

    python -m benchmarks.training --model smollm2-135m --method lora --length 512
    python -m benchmarks.training --peers all --model smollm2-135m --data train.csv --method lora --json F
    python -m benchmarks.training --curves --model smollm2-135m --data train.csv --steps 100 --json F --html F
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.peers.case import TARGETS, Case


def main() -> int:
    options = parse()
    if options.peers or options.curves:
        if not options.data:
            raise SystemExit("--peers and --curves train on real rows: pass --data FILE.csv (or chats, .jsonl).")
        report = curves(options) if options.curves else peers(options)
    else:
        report = alone(options)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0 if report.get("passed", True) else 1


def peers(options: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.peers.compare import chosen, compare, table

    report = compare(
        chosen(options.peers),
        model=options.model,
        data=options.data,
        case=case(options, steps=options.steps or 12),
        turns=options.turns,
        warmup=options.warmup,
        limit_s=options.limit_s,
        work=options.work,
    )
    print(table(report))
    return report


def curves(options: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.training.curves import compare_losses, plot, summary

    report = compare_losses(
        case(options, steps=options.steps or 100),
        model=options.model,
        data=options.data,
        limit_s=options.limit_s,
        work=options.work,
    )
    print(summary(report))
    if options.html:
        options.html.parent.mkdir(parents=True, exist_ok=True)
        options.html.write_text(plot(report), encoding="utf-8")
    return report


def alone(options: argparse.Namespace) -> dict[str, Any]:
    from ft_dist.bench.report import bench
    from ft_dist.bench.show import html, text

    report = bench(
        options.model,
        options.overrides,
        data=str(options.data or "synthetic"),
        method=options.method,
        length=options.length,
        rows=options.rows,
        steps=options.steps or 5,
        nproc=options.nproc,
        sweep=options.sweep,
        scaling=options.scaling,
    )
    print(text(report))
    if options.html:
        options.html.parent.mkdir(parents=True, exist_ok=True)
        options.html.write_text(html(report), encoding="utf-8")
    return report


def case(options: argparse.Namespace, *, steps: int) -> Case:
    """The comparison makes the model and the rows."""
    return Case(
        model=Path(),
        ordered=Path(),
        method=options.method,
        dtype=options.dtype,
        steps=steps,
        rows=options.rows,
        max_length=options.length,
        learning_rate=options.lr,
        rank=options.rank,
        alpha=2 * options.rank,
        targets=tuple(options.targets.split(",")),
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.partition("\n\n")[0])
    parser.add_argument("overrides", nargs="*", metavar="KEY.SUB=VALUE", help="without peers: keys of our config")
    parser.add_argument("--peers", metavar="all|built|NAME,NAME", help="compare with these peers")
    parser.add_argument(
        "--curves", action="store_true", help="losses of TRL and ours on the same rows in the same order"
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", type=Path, metavar="FILE")
    parser.add_argument("--method", default="lora", choices=["lora", "full"])
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"], help="precision of all sides")
    parser.add_argument("--rows", type=int, default=8, help="rows in a step; a peer takes them in one micro-batch")
    parser.add_argument(
        "--length", type=int, default=256, help="longest sample, or tokens of a packed row without peers"
    )
    parser.add_argument("--steps", type=int, help="[default: 12 with peers, 100 for curves, 5 alone]")
    parser.add_argument("--warmup", type=int, default=2, help="untimed steps of a turn")
    parser.add_argument("--turns", type=int, default=2, help="how often each side runs, A B A B")
    parser.add_argument("--limit-s", type=float, default=600, help="a turn is cut off after this long")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapters; alpha is twice that")
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--nproc", type=int)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--scaling", choices=["weak", "strong"])
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep configs and logs of all sides there")
    parser.add_argument("--json", type=Path, metavar="F")
    parser.add_argument("--html", type=Path, metavar="F")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
