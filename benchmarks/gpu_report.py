"""`python -m benchmarks.gpu_report FOLDER`: turns the output of `benchmarks/gpu.sh` into results and tables.

Writes `benchmarks/results/DATE-CHIP.json`, and the tables in `docs/benchmarks.md` between their markers.
What the folder lacks (a stage that was cut off, a row torn by a crash) is listed as missing, with the reason.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import readme
from benchmarks.training.pair import compare

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- gpu: made by python -m benchmarks.gpu_report -->", "<!-- end of gpu -->"
HEADING = "## On a GPU"
LOSS_TOLERANCE = 0.01
"""Largest relative difference of first losses in bf16 that counts as the same work"""
Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_report", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where results.jsonl is")
    parser.add_argument("--results", type=Path, help="folder for the JSON (default: benchmarks/results)")
    parser.add_argument("--docs", type=Path, help="default: docs/benchmarks.md")
    parser.add_argument("--readme", type=Path, help="default: docs/benchmarks.md")
    options = parser.parse_args(arguments)
    report = report_of(read_rows(options.folder / "results.jsonl"))
    if report["dry"] and not (options.results and options.docs and options.readme):
        print("a dry run measures no GPU. Pass --results, --docs and --readme to see its tables.", file=sys.stderr)
        return 2
    results = options.results or ROOT / "benchmarks" / "results"
    docs = options.docs or ROOT / "docs" / "benchmarks.md"
    results.mkdir(parents=True, exist_ok=True)
    chip = re.sub(r"[^a-z0-9]+", "-", report["device"].lower()).strip("-")
    path = results / f"{report['date']}-{chip}.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    docs.write_text(with_section(docs.read_text(encoding="utf-8"), section(report)), encoding="utf-8")
    target = options.readme or docs
    block = readme.block(readme.read(results))
    target.write_text(readme.replaced(target.read_text(encoding="utf-8"), block), encoding="utf-8")
    print(section(report))
    print(f"{path}, {docs}, {target}")
    return 0


def read_rows(path: Path) -> list[Row]:
    """Every whole line; a line cut short by a crash is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "kind" in row:
            rows.append(row)
    return rows


def report_of(rows: Sequence[Row]) -> Row:
    """The record of one call: everything except the rows of single steps."""
    run = _last(rows, "run") or {}
    about = _last(rows, "about") or {}
    bench: dict[str, Row] = {}
    for row in _all(rows, "bench timed", "bench"):  # early figures stay if the rest failed
        bench[row["stage"]] = bench.get(row["stage"], {}) | row
    named = [row.get("device") for row in bench.values() if row.get("device") not in (None, "cpu")]
    dry = bool(run.get("dry"))
    device = "dry run" if dry else about.get("chip", {}).get("name") or (named or ["unknown GPU"])[0]
    parity = _all(rows, "parity")
    return {
        "kind": "gpu",
        "date": str(run.get("date", "undated"))[:10],
        "device": device,
        "dry": dry,
        "versions": about.get("versions", {}),
        "chip": about.get("chip", {}),
        "driver": about.get("smi"),
        "ceilings": {row["name"]: row for row in _all(rows, "ceiling")},
        "attention": {row["name"]: row for row in _all(rows, "attention")},
        "compile": _last(rows, "compile"),
        "steps": _all(rows, "step"),
        "profile": _last(rows, "profile"),
        "parity": {
            "checks": len(parity),
            "failed": [row for row in parity if not row["passed"]],
            "dropout_mask_equal": (_last(rows, "parity mask") or {}).get("equal"),
        },
        "bench": bench,
        **_sides(rows),
        "ops": _all(rows, "op"),
        "stages": {row["stage"]: row for row in _all(rows, "stage")},
    }


def _sides(rows: Sequence[Row]) -> Row:
    """Ratios of ours to each peer that did the same work."""
    turns = {row["side"]: [row] for row in _all(rows, "side") if "failed" not in row}
    failed = {row["side"]: row["failed"] for row in _all(rows, "side") if "failed" in row and row["side"] not in turns}
    if "ours" not in turns:
        return {
            "sides": {side: taken[0] for side, taken in turns.items()},
            "ratios": {},
            "unequal": {},
            "failures": failed,
        }
    found = compare(turns, loss_tolerance=LOSS_TOLERANCE)
    for side, record in found["sides"].items():
        record["checkpointing"] = turns[side][0]["checkpointing"]
    return {key: found[key] for key in ("sides", "ratios", "unequal")} | {"failures": failed}


def section(report: Row) -> str:
    """The Markdown between the markers."""
    versions = ", ".join(f"{name} {value}" for name, value in report["versions"].items() if value)
    lines = [f"{report['date']}, {report['device']}{f' ({versions})' if versions else ''}."]
    parts = (_ceilings(report), _throughput(report), _attention(report), _ops(report), _profile(report))
    for part in filter(None, parts):
        lines += ["", *part]
    parity = report["parity"]
    if parity["checks"]:
        names = "; ".join(f"{row['op']} {row['shape']} T={row['tokens']}" for row in parity["failed"])
        found = f"{len(parity['failed'])} failed{': ' if names else ''}{names}"
        lines += ["", f"Parity in bf16: {parity['checks']} checks, {found}."]
    lost = {name: row for name, row in report["stages"].items() if row["outcome"] != "done"}
    lines += [""] if lost else []
    lines += [f"Not measured: {name}: {row['outcome']}, {row.get('why', '')}." for name, row in lost.items()]
    return "\n".join(lines)


def _ceilings(report: Row) -> list[str]:
    found = []
    for name, key, unit in (
        ("copy", "bytes_per_s", "TB/s read and written"),
        ("bf16 product", "flops_per_s", "TFLOP/s"),
        ("fp8 product", "flops_per_s", "TFLOP/s"),
    ):
        rate = report["ceilings"].get(name, {}).get(key)
        found += [f"{name} {rate / 1e12:.2f} {unit}"] if rate else []
    return [f"Ceilings: {'; '.join(found)}."] if found else []


def _throughput(report: Row) -> list[str]:
    def cells(name: str, rate: float, row: Row, ratio: str) -> str:
        memory = f"{row['peak_bytes'] / 2**30:.1f}"
        return _cells(name, f"{rate:,.0f}", f"{row['step_s']:.3f}", _percent(row.get("mfu")), memory, ratio)

    lines = [
        cells(name, row["real_tokens_per_s"], row, "")
        for name, row in report["bench"].items()
        if "real_tokens_per_s" in row
    ]
    for side, row in report["sides"].items():
        ratio = report["ratios"].get(side, {}).get("tokens_per_s")
        found = "" if side == "ours" else f"{ratio:.2f}" if ratio else report["unequal"].get(side, "not compared")
        name = f"bare step, {side}{', activation checkpointing' if row['checkpointing'] else ''}"
        lines.append(cells(name, row["tokens_per_s"], row, found))
    return _table(("work", "tokens/s", "step s", "MFU", "peak GiB", "ours to it"), lines)


def _attention(report: Row) -> list[str]:
    lines = []
    for name, row in report["attention"].items():
        if "failed" in row:
            lines.append(_cells(name, _line(row["failed"]), "", ""))
            continue
        first, *others = row["uses"]
        new = max((use["first_s"] for use in others), default=0.0)
        times = (first["first_s"], new, row["uses"][-1]["third_s"])
        lines.append(_cells(name, *(f"{1e3 * seconds:.2f}" for seconds in times)))
    return _table(("attention", "first call, ms", "a new shape at most, ms", "the last shape again, ms"), lines)


def _ops(report: Row) -> list[str]:
    lines = []
    for row in report["ops"]:
        if "failed" in row:
            lines.append(_cells(row["op"], row["shape"], _line(row["failed"]), "", ""))
            continue
        figures = (
            f"{1e3 * row['seconds']['ours']:.3f}",
            _percent(row.get("roofline_share")),
            f"{row['time_ratio']:.2f}",
        )
        lines.append(_cells(row["op"], row["shape"], *figures))
    return _table(("op", "shape", "ms", "of the roofline", "time to eager's"), lines)


def _profile(report: Row) -> list[str]:
    found = report["profile"]
    if not found or "failed" in found:
        return []
    total, device = (1e3 * found[f"{name}_a_step"] for name in ("seconds", "device_s"))
    events, waits = found["device_events_a_step"], sum(found["waits_a_step"].values())
    head = (
        f"A step of {total:.0f} ms: {device:.0f} ms on the device, {events:.0f} kernels and copies, {waits:.0f} waits."
    )
    lines = [
        _cells(f"`{_line(row['name'])[:90]}`", f"{row['ms_a_step']:.2f}", f"{row['calls_a_step']:.0f}")
        for row in found["kernels"][:15]
    ]
    return [head, "", *_table(("kernel", "ms per step", "calls per step"), lines)]


def _table(header: Sequence[str], lines: list[str]) -> list[str]:
    """Empty if there are no lines."""
    return [_cells(*header), "|" + "---|" * len(header), *lines] if lines else []


def _cells(*values: str) -> str:
    return f"| {' | '.join(values)} |"


def with_section(text: str, made: str) -> str:
    """`text` with the part between the markers replaced; without markers, adds a section at the end."""
    if BEGIN not in text:
        text = f"{text.rstrip()}\n\n{HEADING}\n\n{BEGIN}\n{END}\n"
    head, _, rest = text.partition(BEGIN)
    return f"{head}{BEGIN}\n{made}\n{END}{rest.partition(END)[2]}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _line(text: str) -> str:
    """For a cell of a table."""
    return " ".join(text.split()).replace("|", "/")[:160]


def _all(rows: Iterable[Row], *kinds: str) -> list[Row]:
    """In the order of `kinds`."""
    rows = list(rows)
    return [row for kind in kinds for row in rows if row["kind"] == kind]


def _last(rows: Sequence[Row], kind: str) -> Row | None:
    found = _all(rows, kind)
    return found[-1] if found else None


if __name__ == "__main__":
    sys.exit(main())
