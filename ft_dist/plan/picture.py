"""Memory and step as one HTML file with inline SVG: stacked bars, memory through the step, the step's parts in time."""

from html import escape
from pathlib import Path
from typing import Any

from ft_dist.errors import UserError

# Okabe and Ito's palette, which the colour-blind can distinguish; then tints of it
COLOURS = [
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#F0E442",
    "#999999",
    "#7FB8D8",
    "#F2CF80",
    "#80CEB9",
    "#E5BCD3",
]
WIDTH, LEFT, BAR = 900, 20, 860
_STYLE = "body{font:14px sans-serif;max-width:940px;margin:2em auto;color:#222}svg text{font:12px sans-serif}"


def write_picture(tree: dict[str, Any], path: Path) -> None:
    """`tree` is the result of `plan_run`. Raises UserError if the file cannot be written."""
    try:
        path.write_text(page(tree), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--picture {path}: cannot be written ({error.strerror}).") from None


def page(tree: dict[str, Any]) -> str:
    model, world, memory, step = tree["model"], tree["world"], tree["memory"], tree["step"]
    title = f"{model['path']}, {model['method']}, {world['gpus']} x {world['gpu']}, ZeRO {world['zero_stage']}"
    gib = {part: nbytes / 2**30 for part, nbytes in memory["parts_bytes"].items()}
    milliseconds = {part: seconds * 1000 for part, seconds in step["parts"].items() if seconds}
    line = [nbytes / 2**30 for _, nbytes in memory["timeline"]]
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<h2>Peak memory per GPU, {escape(memory['peak_at'])}</h2>",
        bars(gib, unit="GiB", limit=memory["available_bytes"] / 2**30),
        "<h2>Tensors through a step</h2>",
        curve(line, [moment for moment, _ in memory["timeline"]]),
        f"<h2>A step of {step['seconds']:.3g} s: {step['tokens_per_s']:,.0f} tokens/s</h2>",
        bars(milliseconds, unit="ms", limit=None),
    ]
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    return head + "\n".join(body) + "</html>\n"


def bars(parts: dict[str, float], *, unit: str, limit: float | None) -> str:
    """One stacked bar with a legend; `limit` is a line across it."""
    total = sum(parts.values())
    scale = BAR / max(total, limit or 0.0, 1e-12)
    height = 90 + 20 * -(-len(parts) // 3)
    drawn, x = [], float(LEFT)
    for index, (part, value) in enumerate(sorted(parts.items(), key=lambda item: -item[1])):
        colour, width = COLOURS[index % len(COLOURS)], value * scale
        label = f"{escape(part)}: {value:,.2f} {unit}"
        drawn.append(
            f'<rect x="{x:.1f}" y="20" width="{width:.1f}" height="36" fill="{colour}"><title>{label}</title></rect>'
        )
        at_x, at_y = LEFT + 290 * (index % 3), 80 + 20 * (index // 3)
        drawn.append(f'<rect x="{at_x}" y="{at_y - 10}" width="12" height="12" fill="{colour}"/>')
        drawn.append(f'<text x="{at_x + 18}" y="{at_y}">{label}</text>')
        x += width
    if limit is not None:
        at = LEFT + limit * scale
        drawn.append(f'<path d="M{at:.1f} 12V62" stroke="#c00" stroke-width="2"/>')
        drawn.append(
            f'<text x="{at - 4:.1f}" y="11" text-anchor="end" fill="#c00">{limit:,.1f} {unit} available</text>'
        )
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img">{"".join(drawn)}</svg>'


def curve(values: list[float], labels: list[str]) -> str:
    """Memory over the moments of a step, in GiB."""
    top, bottom = 20, 220
    most = max(values)
    across = BAR / max(len(values) - 1, 1)
    points = [(LEFT + index * across, bottom - (bottom - top) * value / most) for index, value in enumerate(values)]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    peak = values.index(most)
    x, anchor = points[peak][0], "end" if peak > len(values) / 2 else "start"
    area = f"{path}L{points[-1][0]:.1f} {bottom}L{LEFT} {bottom}Z"
    return (
        f'<svg viewBox="0 0 {WIDTH} 250" role="img"><path d="{area}" fill="#56B4E9" opacity=".35"/>'
        f'<path d="{path}" fill="none" stroke="#0072B2" stroke-width="1.5"/>'
        f'<text x="{x:.1f}" y="{top - 6}" text-anchor="{anchor}">{most:,.2f} GiB: {escape(labels[peak])}</text>'
        f'<text x="{LEFT}" y="{bottom + 20}">{escape(labels[0])}</text>'
        f'<text x="{LEFT + BAR}" y="{bottom + 20}" text-anchor="end">{escape(labels[-1])}</text></svg>'
    )
