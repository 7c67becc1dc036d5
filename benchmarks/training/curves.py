"""TRL's loss and ours, step by step, from the same weights on the same rows in the same order.

Nothing in full fine-tuning is random, so the curves must coincide. peft draws adapters from torch's generator,
which both sides seed with the same value first.
"""

import tempfile
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.peers import environments, ours
from benchmarks.peers.case import Case
from benchmarks.peers.compare import describe, make_work, peer_of
from benchmarks.peers.turn import take
from ft_dist.bench.report import machine
from ft_dist.resources import versions as own_versions

TOLERANCE = 1e-3
"""Largest absolute difference of the last losses"""
PEER = "trl"
_WIDTH, _HEIGHT, _MARGIN = 900, 420, 50


def compare_losses(case: Case, *, model: str, data: Path, limit_s: float, work: Path | None = None) -> dict[str, Any]:
    """Both losses of every step, their differences, and whether the last one is within TOLERANCE."""
    binaries = environments.build(PEER)
    with tempfile.TemporaryDirectory(prefix="ft_dist-curves-") as temporary:
        folder = work or Path(temporary)
        case, counts = make_work(case, model=model, data=data, folder=folder)
        losses: dict[str, list[float]] = {}
        for peer, place in ((ours.PEER, Path()), (peer_of(PEER), binaries)):
            turn = take(peer, case, counts=counts, folder=folder / peer.name, binaries=place, warmup=1, limit_s=limit_s)
            if "failed" in turn:
                raise SystemExit(f"{peer.name}: {turn['failed']}")
            losses[peer.name] = turn["losses"]
            print(f"  {peer.name}: {len(turn['losses'])} steps, last loss {turn['losses'][-1]:.6f}", flush=True)
    differences = [abs(a - b) for a, b in zip(losses["ours"], losses[PEER], strict=True)]
    return {
        "kind": "curves",
        **machine(),
        "work": describe(case, data, model),
        "versions": {"ours": own_versions(), PEER: environments.versions(PEER)},
        "losses": losses,
        "last_difference": differences[-1],
        "largest_difference": max(differences),
        "tolerance": TOLERANCE,
        "passed": differences[-1] <= TOLERANCE,
    }


def summary(report: dict[str, Any]) -> str:
    count = len(report["losses"]["ours"])
    verdict = "within" if report["passed"] else "NOT within"
    return (
        f"after {count} steps: ours {report['losses']['ours'][-1]:.6f}, TRL {report['losses'][PEER][-1]:.6f}, "
        f"difference {report['last_difference']:.2e}, {verdict} {TOLERANCE:g}; "
        f"largest of all steps {report['largest_difference']:.2e}"
    )


def plot(report: dict[str, Any]) -> str:
    """Both curves in one drawing, our thin line over TRL's broad one, as a self-contained page."""
    from ft_dist.bench.show import page

    losses = report["losses"]
    top = max(max(curve) for curve in losses.values())
    colours = {PEER: ("#f28e2b", 5), "ours": ("#4e79a7", 1.5)}
    drawn = [
        f'<polyline fill="none" stroke="{colour}" stroke-width="{width}" points="{_points(losses[side], top)}"/>'
        for side, (colour, width) in colours.items()
    ]
    for number, (side, (colour, _)) in enumerate(colours.items()):
        drawn.append(f'<text x="{_WIDTH - 160}" y="{30 + 18 * number}" fill="{colour}">{escape(side)}</text>')
    bottom = _HEIGHT - _MARGIN
    drawn.append(f'<path d="M{_MARGIN} 10V{bottom}H{_WIDTH - 10}" fill="none" stroke="#888"/>')
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = bottom - share * (bottom - 10)
        drawn.append(f'<text x="4" y="{y + 4:.0f}">{share * top:.2f}</text>')
    drawn.append(f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 15}">step, 1 to {len(losses["ours"])}</text>')
    svg = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" font-size="12">{"".join(drawn)}</svg>'
    return page("Loss on the same rows in the same order", [svg, f"<p>{escape(summary(report))}</p>"])


def _points(curve: Sequence[float], top: float) -> str:
    across, up = (_WIDTH - 10 - _MARGIN) / max(1, len(curve) - 1), (_HEIGHT - _MARGIN - 10) / top
    return " ".join(f"{_MARGIN + at * across:.1f},{_HEIGHT - _MARGIN - loss * up:.1f}" for at, loss in enumerate(curve))
