"""`python -m benchmarks.readme`: write the table of results into README, between its markers, from benchmarks/results/.

The newest file of each kind counts. CPU and GPU stand apart, every row has its date, and what was not measured is said.
`--check` writes nothing and ends with exit code 1 where README is not what would be written.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- benchmarks: made by python -m benchmarks.readme -->", "<!-- end of benchmarks -->"
ALL_PEERS = ("trl", "llamafactory", "ms-swift", "litgpt", "torchtune", "axolotl")
GPU_PEERS = ("liger", "unsloth")
# the stages of benchmarks/gpu.sh that run the product whole
GPU_WORK = {
    "bench": "Llama-3-8B LoRA, full rows of 4,096",
    "bench-chats": "Llama-3-8B LoRA, packed chats",
    "bench-fp8": "Llama-3-8B LoRA, FP8 base, full rows",
    "bench-fp8-chats": "Llama-3-8B LoRA, FP8 base, packed chats",
    "full-3b": "Llama-3.2-3B full, activation checkpointing",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    before = options.readme.read_text(encoding="utf-8")
    after = replaced(before, block(read(options.results)))
    if options.check:
        return int(before != after)
    options.readme.write_text(after, encoding="utf-8")
    return 0


def read(results: Path) -> list[dict[str, Any]]:
    """Every report, oldest first, with the file that it stands in."""
    return [
        json.loads(path.read_text(encoding="utf-8")) | {"file": path.name} for path in sorted(results.glob("*.json"))
    ]


def replaced(text: str, made: str) -> str:
    """`text` with what stands between the markers replaced. Raises SystemExit where they are not there."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"README needs each of these lines once:\n{BEGIN}\n{END}")
    head, _, rest = text.partition(BEGIN)
    return f"{head}{BEGIN}\n{made}\n{END}{rest.partition(END)[2]}"


def block(reports: list[dict[str, Any]]) -> str:
    """The whole section as Markdown."""
    lines: list[str] = []
    for device in ("CPU", "GPU"):
        mine = [report for report in reports if is_gpu(report) == (device == "GPU")]
        rows = [row for report in newest(mine) for row in rows_of(report)]
        lines += [f"**{device}**", ""]
        lines += gpu_table(mine)
        if rows:
            lines += ["| date | work | ours to | rate | start | peak memory |", "|---|---|---|---|---|---|", *rows, ""]
        lines += [f"Not measured: {line}" for line in missing(mine, device)] + [""]
    return "\n".join(lines).strip()


def is_gpu(report: dict[str, Any]) -> bool:
    device = str(report.get("device", "cpu"))
    return "NVIDIA" in device or "AMD Instinct" in device or device.startswith(("H100", "H200", "B200", "A100"))


def newest(reports: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last report of every kind of work beside the same peers."""
    last: dict[str, dict[str, Any]] = {}
    for report in reports:
        if report.get("kind") in ("peers", "pair", "quick", "curves"):
            last[f"{report['kind']} {work(report)} {sorted(report.get('sides', []))}"] = report
    return list(last.values())


def gpu_table(reports: Iterable[dict[str, Any]]) -> list[str]:
    """Of the last call of `benchmarks/gpu.sh` on every chip: what the product reaches, and bare steps beside peers."""
    last = {report["device"]: report for report in reports if report.get("kind") == "gpu"}
    rows = []
    for chip, report in last.items():
        start = f"| {report['date']} | {chip} |"
        for stage, row in report["bench"].items():
            if "real_tokens_per_s" in row:
                rows.append(f"{start} {GPU_WORK.get(stage, stage)} | {gpu_figures(row, row['real_tokens_per_s'])} | |")
        for side, row in report["sides"].items():
            ratio = report["ratios"].get(side, {}).get("tokens_per_s")
            told = f"{ratio:.2f}" if ratio else ""
            name = f"{side}, with activation checkpointing" if row.get("checkpointing") else side
            rows.append(f"{start} bare step: {name} | {gpu_figures(row, row['tokens_per_s'])} | {told} |")
    header = ["| date | GPU | work | tokens/s | MFU | peak GiB | ours to it |", "|---|---|---|---|---|---|---|"]
    return [*header, *rows, ""] if rows else []


def gpu_figures(row: dict[str, Any], rate: float) -> str:
    mfu = "" if row.get("mfu") is None else f"{row['mfu']:.0%}"
    return f"{rate:,.0f} | {mfu} | {row['peak_bytes'] / 2**30:.1f}"


def work(report: dict[str, Any]) -> str:
    """What was done, in a few words."""
    if report["kind"] in ("peers", "curves"):
        told = report["work"]
        turns = max(map(len, report.get("turns", {}).values()), default=0)
        times = f", {turns} turn{'s' if turns > 1 else ''}" if turns else ""
        rows = f"{told['rows_a_step']} rows of {told['data']} a step"
        return f"{told['model']} {told['method']} {told['dtype']}, {rows}{times}"
    arguments = report.get("arguments") or report.get("work") or []
    told = " ".join(arguments).replace("--", "")
    return f"{told}, random tokens"


def rows_of(report: dict[str, Any]) -> list[str]:
    """A line for every side that did the same work; ratios of ours to it, rates above 1 are ours."""
    when, what = report["date"], work(report)
    if report["kind"] == "peers":
        sides = report["sides"]
        rows = []
        for side in report["ranking"]:
            if side.startswith("ours"):
                continue
            mine = sides["ours packed"] if "ours packed" in report["ranking"] else sides["ours"]
            plain = sides["ours"] if not side.endswith(" packed") else mine
            row = sides[side]
            rate = mine["labelled_tokens_per_s"] / row["labelled_tokens_per_s"]
            alike = plain["labelled_tokens_per_s"] / row["labelled_tokens_per_s"]
            start = mine["first_step_s"] / row["first_step_s"]
            peak = mine["peak_bytes"] / row["peak_bytes"]
            rows.append(f"| {when} | {what} | {side} | {rate:.2f} ({alike:.2f}) | {start:.2f} | {peak:.2f} |")
        return rows
    if report["kind"] == "curves":
        verdict = f"loss after {len(report['losses']['ours'])} steps differs by {report['last_difference']:.1e}"
        return [f"| {when} | {what} | TRL | {verdict} | | |"]
    ratios = report["ratios"]
    if report["kind"] == "quick":
        methods = ("lora", "full")
        return [
            f"| {when} | {method}, {what} | {report['against']} | {ratios[f'{method}_tokens_per_s']:.2f} | | "
            f"{ratios[f'{method}_peak']:.2f} |"
            for method in methods
        ]
    return [
        f"| {when} | {what} | {side} | {found['tokens_per_s']:.2f} | | {found['peak']:.2f} |"
        for side, found in ratios.items()
    ]


def missing(reports: list[dict[str, Any]], device: str) -> list[str]:
    """What a reader would look for and not find, with the reason where a run told one."""
    lines = []
    compared = [report for report in newest(reports) if report["kind"] in ("peers", "pair")]
    stages = {report["device"]: report for report in reports if report.get("kind") == "gpu"}
    for chip, report in stages.items():
        lost = [(name, row) for name, row in report["stages"].items() if row["outcome"] != "done"]
        lines += [f"{name} ({chip}): {row['outcome']}, {row.get('why', '')}".rstrip(", ") for name, row in lost]
        lines += [f"{side} ({chip}) did other work: {why}" for side, why in report["unequal"].items()]
    if stages and not compared:
        return lines
    if not compared:
        lines.append(f"no comparison with peers on a {device} yet.")
    for report in compared:
        lines += [f"{side} ({work(report)}): {why}" for side, why in report.get("failures", {}).items()]
        unequal = report.get("unequal") or {
            side: row["difference"] for side, row in report["sides"].items() if row.get("difference")
        }
        lines += [f"{side} ({work(report)}) did other work: {why}" for side, why in unequal.items()]
    tried = {side.removesuffix(" packed") for report in compared for side in (*report["sides"], *report["failures"])}
    untried = [name for name in (ALL_PEERS if device == "CPU" else GPU_PEERS) if name not in tried]
    if compared and untried:
        lines.append(f"{', '.join(untried)}.")
    return lines


if __name__ == "__main__":
    sys.exit(main())
