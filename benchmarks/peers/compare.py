"""Ours and the peers in turn, A B A B, on the same work; one table, one JSON file.

A side whose first loss differs from ours did different work: it is shown, marked, and not ranked. If a step of a packed
side holds other rows than ours, the mean loss over all steps is compared instead.
"""

import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.peers import environments, ours, rows
from benchmarks.peers.case import Case, Peer
from benchmarks.peers.turn import side_name, take
from ft_dist.bench.report import machine
from ft_dist.model.builtin import cache_dir
from ft_dist.resources import versions as own_versions

NAMES = environments.NAMES
FIRST_LOSS_TOLERANCE = {"fp32": 2e-3, "bf16": 3e-2}
"""Relative: some logs round to four digits, and bf16 sums differ between libraries"""
MEAN_LOSS_TOLERANCE = 0.1
"""Relative, of packed rows: the same samples in other steps, with other adapters' random starts"""


def chosen(wanted: str) -> list[str]:
    """all, built (those whose environment exists), or names with commas. Raises SystemExit for an unknown name."""
    if wanted == "all":
        return list(NAMES)
    if wanted == "built":
        return [name for name in NAMES if environments.is_built(name)]
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    for name in names:
        if name not in NAMES:
            raise SystemExit(f"--peers {name}: not one of {', '.join(NAMES)}; or say all or built.")
    return names


def peer_of(name: str) -> Peer:
    found: Peer = import_module(f"benchmarks.peers.{name.replace('-', '_')}").PEER
    return found


def compare(
    names: Sequence[str],
    *,
    model: str,
    data: Path,
    case: Case,
    turns: int,
    warmup: int,
    limit_s: float,
    work: Path | None = None,
) -> dict[str, Any]:
    """Run every side `turns` times and return the report. `case` has no model or data yet; they are made here."""
    load_at_start = os.getloadavg()[0]
    failures: dict[str, str] = {}
    sides: list[tuple[Peer, Path]] = [(ours.PEER, Path())]
    for name in names:
        try:
            sides.append((peer_of(name), environments.build(name)))
        except environments.EnvironmentFailedError as error:
            failures[name] = f"not installed: {error}"
            print(f"{name}: not installed: {error}", flush=True)
    with tempfile.TemporaryDirectory(prefix="ft_dist-peers-") as temporary:
        folder = work or Path(temporary)
        case, counts = make_work(case, model=model, data=data, folder=folder)
        options: dict[str, Any] = {"counts": counts, "warmup": warmup, "limit_s": limit_s}
        taken = _take_turns(sides, case, turns=turns, folder=folder / "turns", options=options)
    good = {side: [turn for turn in results if "failed" not in turn] for side, results in taken.items()}
    good = {side: results for side, results in good.items() if results}
    failures |= {side: turn["failed"] for side, results in taken.items() for turn in results if "failed" in turn}
    report = summary(good, dtype=case.dtype)
    notes = {peer.name: peer.note for peer, _ in sides if peer.note}
    versions = {name: environments.versions(name) for name in names if name not in failures}
    return {
        "kind": "peers",
        **machine(),
        "load_at_start": load_at_start,
        "work": describe(case, data, model) | {"tokens": sum(counts.real), "labelled_tokens": sum(counts.labelled)},
        "versions": {"ours": own_versions(), **versions},
        **report,
        "failures": failures,
        "notes": notes,
        "turns": taken,
    }


def _take_turns(
    sides: Sequence[tuple[Peer, Path]], case: Case, *, turns: int, folder: Path, options: dict[str, Any]
) -> dict[str, list[dict[str, Any]]]:
    """Every side unpacked, and packed if it can; repeated for each turn. A side that failed is not retried.

    Ctrl-C ends the turns; the report is still written.
    """
    todo = [(peer, binaries, replace(case, packed=flag)) for peer, binaries in sides for flag in (False, True)]
    todo = [(peer, binaries, one) for peer, binaries, one in todo if peer.packs or not one.packed]
    taken: dict[str, list[dict[str, Any]]] = {side_name(peer, one): [] for peer, _, one in todo}
    try:
        for peer, binaries, one in todo * turns:
            side = side_name(peer, one)
            if any("failed" in turn for turn in taken[side]):
                continue
            dealt = replace(one, ordered=_dealt(peer, one))
            result = take(peer, dealt, folder=folder / side.replace(" ", "-"), binaries=binaries, **options)
            taken[side].append(result)
            print(_line(result), flush=True)
    except KeyboardInterrupt:
        print("interrupted: the report holds the finished turns", flush=True)
    return taken


def make_work(case: Case, *, model: str, data: Path, folder: Path) -> tuple[Case, rows.Counts]:
    """Checkpoint and rows, written once for all sides: chats.jsonl for us, ordered.jsonl in our order for the peers."""
    checkpoint = rows.checkpoint(model, case.dtype, cache_dir() / "peers" / "models")
    chats = rows.spread(rows.read_chats(data), case.steps * case.rows)
    written = rows.write_jsonl(folder / "data" / "chats.jsonl", chats)
    case = replace(case, model=checkpoint, ordered=folder / "data" / "ordered.jsonl")
    config = ours.config(case, folder / "order", chats=written)
    ordered, counts = rows.in_our_order(config, chats, case.steps)
    rows.write_jsonl(case.ordered, ordered)
    longest = rows.longest(config)
    content = {"real": counts.real, "labelled": counts.labelled, "longest": longest}
    (folder / "data" / "counts.json").write_text(json.dumps(content), encoding="utf-8")
    return case, counts


def _dealt(peer: Peer, case: Case) -> Path:
    """The file from which this peer's loader reads our order."""
    chats = rows.read_chats(case.ordered)
    order = peer.order(len(chats), case.seed)
    if order == list(range(len(chats))):
        return case.ordered
    return rows.write_jsonl(case.ordered.with_name(f"ordered-{peer.name}.jsonl"), rows.deal(chats, order))


def summary(taken: dict[str, list[dict[str, Any]]], *, dtype: str) -> dict[str, Any]:
    """Medians over the turns of each side, whether it did the same work as ours, and the ratios to ours."""
    sides: dict[str, dict[str, Any]] = {}
    for side, turns in taken.items():
        sides[side] = {
            key: statistics.median(turn[key] for turn in turns)
            for key in (
                "labelled_tokens_per_s",
                "real_tokens_per_s",
                "first_step_s",
                "step_s",
                "first_loss",
                "mean_loss",
            )
        }
        sides[side] |= {"peak_bytes": max(turn["peak_bytes"] for turn in turns), "steps": turns[0]["steps"]}
    if "ours" not in sides:
        return {"sides": sides, "ratios": {}, "ranking": []}
    for side, row in sides.items():
        row["difference"] = unequal(sides["ours"], row, packed=side.endswith(" packed"), dtype=dtype)
    equal = {side: row for side, row in sides.items() if not row["difference"]}
    ranking = sorted(equal, key=lambda side: -equal[side]["labelled_tokens_per_s"])
    return {"sides": sides, "ranking": ranking, "ratios": ratios(equal)}


def unequal(reference: dict[str, Any], row: dict[str, Any], *, packed: bool, dtype: str) -> str | None:
    """Why a side's losses show that it did different work from ours; None if they match."""
    tolerance = FIRST_LOSS_TOLERANCE[dtype]
    first = abs(row["first_loss"] / reference["first_loss"] - 1)
    if first <= tolerance:
        return None
    if not packed:
        return f"first loss {row['first_loss']:.5f}, ours {reference['first_loss']:.5f}"
    mean = abs(row["mean_loss"] / reference["mean_loss"] - 1)
    if mean <= MEAN_LOSS_TOLERANCE:
        return None
    return f"mean loss {row['mean_loss']:.5f}, ours {reference['mean_loss']:.5f}"


def ratios(equal: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Ours to the fastest peer: both at their best, both unpacked, and the time to the first step."""
    mine = [row for side, row in equal.items() if side.startswith("ours")]
    theirs = {side: row for side, row in equal.items() if not side.startswith("ours")}
    if not theirs:
        return {}

    def best(found: Sequence[dict[str, Any]], key: str) -> float:
        return max(row[key] for row in found)

    unpacked = [row for side, row in theirs.items() if not side.endswith(" packed")]
    found = {
        "labelled_tokens_per_s_best": best(mine, "labelled_tokens_per_s")
        / best(list(theirs.values()), "labelled_tokens_per_s"),
        "first_step_s": min(row["first_step_s"] for row in mine) / min(row["first_step_s"] for row in theirs.values()),
        "peak": min(row["peak_bytes"] for row in mine) / min(row["peak_bytes"] for row in theirs.values()),
    }
    if unpacked:
        found["labelled_tokens_per_s_unpacked"] = equal["ours"]["labelled_tokens_per_s"] / best(
            unpacked, "labelled_tokens_per_s"
        )
    return found


def table(report: dict[str, Any]) -> str:
    """One row per side, fastest first, then the sides that were not ranked, with the reason."""
    lines = [
        f"{'':22}{'labelled/s':>11}{'real/s':>9}{'step s':>9}{'first step s':>14}{'peak MiB':>10}{'first loss':>12}"
    ]
    rest = [side for side in report["sides"] if side not in report["ranking"]]
    for side in [*report["ranking"], *rest]:
        row = report["sides"][side]
        lines.append(
            f"{side:22}{row['labelled_tokens_per_s']:11.1f}{row['real_tokens_per_s']:9.1f}{row['step_s']:9.3f}"
            f"{row['first_step_s']:14.1f}{row['peak_bytes'] / 2**20:10.0f}{row['first_loss']:12.5f}"
            + (f"  NOT THE SAME WORK: {row['difference']}" if row.get("difference") else "")
        )
    lines += [f"{side:22}failed: {why}" for side, why in report["failures"].items()]
    lines += [f"ratio {name}: {value:.2f}" for name, value in report["ratios"].items()]
    return "\n".join(lines)


def _line(result: dict[str, Any]) -> str:
    if "failed" in result:
        return f"  {result['side']:22} failed: {result['failed']}"
    return (
        f"  {result['side']:22}{result['labelled_tokens_per_s']:9.1f} labelled tokens/s, first step after "
        f"{result['first_step_s']:.1f} s, first loss {result['first_loss']:.5f}"
    )


def describe(case: Case, data: Path, model: str) -> dict[str, Any]:
    adapters = {"rank": case.rank, "alpha": case.alpha, "targets": list(case.targets)} if case.method == "lora" else {}
    return {
        "model": Path(model).name,
        "data": data.name,
        "method": case.method,
        "dtype": case.dtype,
        **adapters,
        "rows_a_step": case.rows,
        "steps": case.steps,
        "learning_rate": case.learning_rate,
        "labels": "assistant's turns and their end token",
        "threads": "each side's own default",
    }
