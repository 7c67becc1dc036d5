"""`python -m benchmarks.readme`: write the tables of README.md and docs/benchmarks.md from benchmarks/results/.

README has one row per trainer. docs/benchmarks.md has the newest file of each kind, CPU and GPU in separate tables,
with dates and with what was not measured. `--check` writes nothing and exits with 1 if either file would change.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- benchmarks: written by python -m benchmarks.readme -->", "<!-- end of benchmarks -->"
SHORT_BEGIN, SHORT_END = "<!-- comparison: written by python -m benchmarks.readme -->", "<!-- end of comparison -->"
ALL_PEERS = ("trl", "llamafactory", "ms-swift", "litgpt", "torchtune", "axolotl")
GPU_PEERS = ("liger", "unsloth")
# the stages of benchmarks/gpu.sh that run the whole product
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
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    reports = read(options.results)
    texts = {
        ROOT / "README.md": (comparison(reports), SHORT_BEGIN, SHORT_END),
        ROOT / "docs" / "benchmarks.md": (block(reports), BEGIN, END),
    }
    stale = False
    for path, (table, begin, end) in texts.items():
        before = path.read_text(encoding="utf-8")
        after = replaced(before, table, begin=begin, end=end)
        stale |= before != after
        if not options.check:
            path.write_text(after, encoding="utf-8")
    return int(stale and options.check)


def read(results: Path) -> list[dict[str, Any]]:
    """Every report, oldest first, with its file's name."""
    return [
        json.loads(path.read_text(encoding="utf-8")) | {"file": path.name} for path in sorted(results.glob("*.json"))
    ]


def replaced(text: str, table: str, *, begin: str = BEGIN, end: str = END) -> str:
    """`text` with `table` between the markers. Raises SystemExit if the markers are missing."""
    if text.count(begin) != 1 or text.count(end) != 1:
        raise SystemExit(f"the page needs each of these lines once:\n{begin}\n{end}")
    head, _, rest = text.partition(begin)
    return f"{head}{begin}\n{table}\n{end}{rest.partition(end)[2]}"


def comparison(reports: Iterable[dict[str, Any]]) -> str:
    """One row per trainer: ratios of ours, packed, to its faster form. The report with the most turns counts."""
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for report in reports:
        if report.get("kind") != "peers" or is_gpu(report):
            continue
        for peer in ALL_PEERS:
            key = (peer, report["work"]["method"])
            if faster_form(report, peer) and (key not in best or turns_of(report) >= turns_of(best[key])):
                best[key] = report
    methods = {"lora": "LoRA", "full": "full"}
    columns = [f"{name}: {what}" for name in methods.values() for what in ("rate", "first step", "memory")]
    lines = [f"| trainer | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for peer in ALL_PEERS:
        cells = [cell for method in methods for cell in short_cells(best.get((peer, method)), peer)]
        lines.append(f"| {peer} | {' | '.join(cells)} |")
    return "\n".join(lines)


def faster_form(report: dict[str, Any], peer: str) -> str | None:
    """`peer`, packed or not, whichever ranks higher; None if it did not do the same work."""
    return next((side for side in report["ranking"] if side.removesuffix(" packed") == peer), None)


def turns_of(report: dict[str, Any]) -> int:
    return max(map(len, report.get("turns", {}).values()), default=0)


def short_cells(report: dict[str, Any] | None, peer: str) -> list[str]:
    side = report and faster_form(report, peer)
    if not report or not side:
        return ["", "", ""]
    return [f"{value:.2f}" for value in ratios_to(report, side)]


def ratios_to(report: dict[str, Any], side: str) -> tuple[float, float, float]:
    """Ours, packed where that was measured, over `side`: labelled tokens/s, time to the first step, peak memory."""
    ours, other = packed_ours(report), report["sides"][side]
    return (
        ours["labelled_tokens_per_s"] / other["labelled_tokens_per_s"],
        ours["first_step_s"] / other["first_step_s"],
        ours["peak_bytes"] / other["peak_bytes"],
    )


def packed_ours(report: dict[str, Any]) -> dict[str, Any]:
    return report["sides"]["ours packed" if "ours packed" in report["ranking"] else "ours"]


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
    """The last report of every kind of work with the same peers."""
    last: dict[str, dict[str, Any]] = {}
    for report in reports:
        if report.get("kind") in ("peers", "pair", "quick", "curves"):
            last[f"{report['kind']} {work(report)} {sorted(report.get('sides', []))}"] = report
    return list(last.values())


def gpu_table(reports: Iterable[dict[str, Any]]) -> list[str]:
    """The last run of `benchmarks/gpu.sh` on every chip: figures of the product, then bare steps of all sides."""
    last = {report["device"]: report for report in reports if report.get("kind") == "gpu"}
    rows = []
    for chip, report in last.items():
        start = f"| {report['date']} | {chip} |"
        for stage, row in report["bench"].items():
            if "real_tokens_per_s" in row:
                rows.append(f"{start} {GPU_WORK.get(stage, stage)} | {gpu_figures(row, row['real_tokens_per_s'])} | |")
        for side, row in report["sides"].items():
            ratio = report["ratios"].get(side, {}).get("tokens_per_s")
            factor = f"{ratio:.2f}" if ratio else ""
            name = f"{side}, with activation checkpointing" if row.get("checkpointing") else side
            rows.append(f"{start} bare step: {name} | {gpu_figures(row, row['tokens_per_s'])} | {factor} |")
    header = ["| date | GPU | work | tokens/s | MFU | peak GiB | ours to it |", "|---|---|---|---|---|---|---|"]
    return [*header, *rows, ""] if rows else []


def gpu_figures(row: dict[str, Any], rate: float) -> str:
    mfu = "" if row.get("mfu") is None else f"{row['mfu']:.0%}"
    return f"{rate:,.0f} | {mfu} | {row['peak_bytes'] / 2**30:.1f}"


def work(report: dict[str, Any]) -> str:
    """The work in a few words."""
    if report["kind"] in ("peers", "curves"):
        case, turns = report["work"], turns_of(report)
        times = f", {turns} turn{'s' if turns > 1 else ''}" if turns else ""
        rows = f"{case['rows_a_step']} rows of {case['data']} per step"
        return f"{case['model']} {case['method']} {case['dtype']}, {rows}{times}"
    arguments = report.get("arguments") or report.get("work") or []
    return f"{' '.join(arguments).replace('--', '')}, random tokens"


def rows_of(report: dict[str, Any]) -> list[str]:
    """One line per side that did the same work: ratios of ours to it."""
    when, what = report["date"], work(report)
    if report["kind"] == "peers":
        rows = []
        for side in report["ranking"]:
            if side.startswith("ours"):
                continue
            rate, start, peak = ratios_to(report, side)
            same_form = packed_ours(report) if side.endswith(" packed") else report["sides"]["ours"]
            unpacked = same_form["labelled_tokens_per_s"] / report["sides"][side]["labelled_tokens_per_s"]
            rows.append(f"| {when} | {what} | {side} | {rate:.2f} ({unpacked:.2f}) | {start:.2f} | {peak:.2f} |")
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
    """The measurements that are missing, with the reason if a run recorded one."""
    lines = []
    compared = [report for report in newest(reports) if report["kind"] in ("peers", "pair")]
    stages = {report["device"]: report for report in reports if report.get("kind") == "gpu"}
    for chip, report in stages.items():
        lost = [(name, row) for name, row in report["stages"].items() if row["outcome"] != "done"]
        lines += [f"{name} ({chip}): {row['outcome']}, {row.get('why', '')}".rstrip(", ") for name, row in lost]
        lines += [f"{side} ({chip}) did different work: {why}" for side, why in report["unequal"].items()]
    if stages and not compared:
        return lines
    if not compared:
        lines.append(f"no comparison with peers on a {device} yet.")
    for report in compared:
        lines += [f"{side} ({work(report)}): {why}" for side, why in report.get("failures", {}).items()]
        unequal = report.get("unequal") or {
            side: row["difference"] for side, row in report["sides"].items() if row.get("difference")
        }
        lines += [f"{side} ({work(report)}) did different work: {why}" for side, why in unequal.items()]
    tried = {side.removesuffix(" packed") for report in compared for side in (*report["sides"], *report["failures"])}
    untried = [name for name in (ALL_PEERS if device == "CPU" else GPU_PEERS) if name not in tried]
    if compared and untried:
        lines.append(f"{', '.join(untried)}.")
    return lines


if __name__ == "__main__":
    sys.exit(main())
