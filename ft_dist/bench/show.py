"""The report of a measurement as a table for the terminal and as one HTML file with inline charts."""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from ft_dist.bench.figures import FORMULA, PHASES
from ft_dist.bench.measure import FAILED, fastest, settings_line

COLOURS = ("#4e79a7", "#59a14f", "#f28e2b", "#e15759", "#b07aa1", "#9c755f", "#bab0ac")
_WIDTH, _BAR, _LEFT = 900, 26, 300


def text(report: dict[str, Any]) -> str:
    """One line per measurement, then the time by phase of the fastest; a sweep ends with the fastest that fits."""
    records = report["measurements"]
    width = 2 + max(len(name_of(record, report)) for record in records)
    lines = [f"{'':{width}}{'real/s':>10}{'labelled/s':>12}{'step s':>9}{'MFU':>7}{'peak MiB':>10}{'padding':>9}"]
    for record in records:
        name = f"{name_of(record, report):{width}}"
        if FAILED in record:
            lines.append(f"{name}{record[FAILED]}")
            continue
        lines.append(
            f"{name}{record['real_tokens_per_s']:10,.0f}{record['labelled_tokens_per_s']:12,.0f}"
            f"{record['step_s']:9.3f}{record['mfu']:7.1%}{record['peak_bytes'] / 2**20:10,.0f}"
            f"{record['padded_share']:9.1%}"
            + (f"  efficiency {record['efficiency']:.2f}" if "efficiency" in record else "")
        )
    best = fastest(records)
    if best:
        lines += [
            "",
            *time_lines(best),
            f"utilisation of {best['peak_flops'] / 1e12:.2f} TFLOP/s ({best['peak_flops_source']})",
        ]
    lines.append(FORMULA)
    if report["kind"] == "sweep":
        settings = {key: best[key] for key in report["swept"]} if best else {}
        lines.append(f"fastest that fits: {settings_line(settings)}" if best else "nothing fits")
    return "\n".join(lines)


def time_lines(record: dict[str, Any]) -> list[str]:
    """Seconds and share of a step by phase; a checkpoint is listed without a share, as not every step has one."""
    whole = sum(seconds for phase, seconds in record["time"].items() if phase != "checkpoint")
    lines = ["where a step's time goes:"]
    for phase, seconds in record["time"].items():
        share = "a save" if phase == "checkpoint" else f"{seconds / whole:.0%}" if whole else ""
        lines.append(f"  {phase:14}{seconds:10.4f} s {share:>7}")
    return lines


def name_of(record: dict[str, Any], report: dict[str, Any]) -> str:
    if report["kind"] == "scaling":
        return f"{record['world_size']} ranks" if "world_size" in record else FAILED
    keys = report.get("swept", [])
    return settings_line({key: record[key] for key in keys}) if keys else report["title"]


def html(report: dict[str, Any]) -> str:
    """One self-contained page, without scripts or other files."""
    ran = [record for record in report["measurements"] if FAILED not in record]
    names = [name_of(record, report) for record in ran]
    parts = [
        bars("real tokens/s", names, [record["real_tokens_per_s"] for record in ran]),
        bars("peak memory, MiB", names, [record["peak_bytes"] / 2**20 for record in ran]),
        stacked("where a step's time goes, seconds", names, [record["time"] for record in ran]),
    ]
    if report["kind"] == "scaling":
        parts.append(bars("efficiency", names, [record["efficiency"] for record in ran]))
    return page(report["title"], [*parts, f"<pre>{escape(text(report))}</pre>"])


def page(title: str, parts: Sequence[str]) -> str:
    style = (
        "body{font:14px sans-serif;max-width:960px;margin:2em auto}pre{overflow:auto;background:#f6f6f6;padding:1em}"
    )
    body = "\n".join(parts)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{style}</style>'
        f"<h1>{escape(title)}</h1>\n{body}</html>\n"
    )


def bars(title: str, names: Sequence[str], values: Sequence[float]) -> str:
    return stacked(title, names, [{"": value} for value in values], legend=False)


def stacked(title: str, names: Sequence[str], rows: Sequence[dict[str, float]], *, legend: bool = True) -> str:
    """One bar per row, split into its parts; checkpoints are not part of a step and are left out."""
    kept = [{part: value for part, value in row.items() if part != "checkpoint"} for row in rows]
    longest = max((sum(row.values()) for row in kept), default=0.0) or 1.0
    scale = (_WIDTH - _LEFT - 90) / longest
    shapes = []
    for number, (name, row) in enumerate(zip(names, kept, strict=True)):
        y, x = number * _BAR + 4, float(_LEFT)
        shapes.append(f'<text x="0" y="{y + 14}">{escape(name[:44])}</text>')
        for part, value in row.items():
            colour = COLOURS[PHASES.index(part)] if part in PHASES else COLOURS[0]
            shapes.append(
                f'<rect x="{x:.1f}" y="{y}" width="{value * scale:.1f}" height="18" fill="{colour}">'
                f"<title>{escape(part)} {value:.4g}</title></rect>"
            )
            x += value * scale
        shapes.append(f'<text x="{x + 6:.1f}" y="{y + 14}">{sum(row.values()):,.4g}</text>')
    height = len(names) * _BAR + 8
    if legend:
        x = 0
        for part, colour in zip(PHASES, COLOURS, strict=True):
            if part == "checkpoint":
                continue
            shapes.append(f'<rect x="{x}" y="{height + 6}" width="12" height="12" fill="{colour}"/>')
            shapes.append(f'<text x="{x + 17}" y="{height + 16}">{part}</text>')
            x += 120
        height += 26
    drawn = "".join(shapes)
    return (
        f'<h2>{escape(title)}</h2><svg viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" font-size="12" '
        f'font-family="sans-serif" role="img">{drawn}</svg>'
    )


def write(report: dict[str, Any], folder: Path) -> None:
    """bench.json and bench.html in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (folder / "bench.html").write_text(html(report), encoding="utf-8")
