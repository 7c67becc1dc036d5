"""One turn of one side: a process from start to last step, and the figures from its log."""

import shutil
import statistics
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.peers import ours
from benchmarks.peers.case import Case, Peer, Step
from benchmarks.peers.process import Finished, run
from benchmarks.peers.rows import Counts

REASON_CHARACTERS = 300


def take(
    peer: Peer, case: Case, *, counts: Counts, folder: Path, binaries: Path, warmup: int, limit_s: float
) -> dict[str, Any]:
    """Run `peer` on `case` once. If the run fails, hangs or stops early, `failed` gives the reason."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        command = peer.command(case, folder, binaries)
    except (LookupError, subprocess.SubprocessError) as error:
        return {"side": side_name(peer, case), "failed": f"could not be set up: {error}"[:REASON_CHARACTERS]}
    finished = run(command, folder=folder, limit_s=limit_s)
    stamped = steps(peer, finished)
    figures: dict[str, Any] = {
        "side": side_name(peer, case),
        "steps": len(stamped),
        "seconds": round(finished.seconds, 3),
        "peak_bytes": finished.peak_bytes,
    }
    if finished.code != 0 or len(stamped) < warmup + 2:
        return figures | {"failed": reason(finished, len(stamped), limit_s)}
    exact = peer.losses(folder)
    losses = [exact.get(step.number, step.loss) for _, step in stamped]
    times = [when for when, _ in stamped]
    spans = [later - earlier for earlier, later in pairwise(times)]
    real, labelled = tokens(peer, case, counts, folder, len(stamped))
    rates = {"real": real, "labelled": labelled}
    figures |= {
        f"{kind}_tokens_per_s": statistics.median(
            count / span for count, span in list(zip(counted[1:], spans, strict=False))[warmup - 1 :]
        )
        for kind, counted in rates.items()
    }
    return figures | {
        "first_step_s": times[0],
        "step_s": statistics.median(spans[warmup - 1 :]),
        "first_loss": losses[0],
        "mean_loss": weighted_mean(losses, labelled),
        "losses": losses,
    }


def side_name(peer: Peer, case: Case) -> str:
    return f"{peer.name} packed" if case.packed else peer.name


def steps(peer: Peer, finished: Finished) -> list[tuple[float, Step]]:
    """When each step ended, in seconds since the start."""
    found: list[tuple[float, Step]] = []
    for when, line in finished.step_lines:
        step = peer.step_of(line, len(found))
        if step is not None and (not found or step.number > found[-1][1].number):
            found.append((when, step))
    return found


def tokens(peer: Peer, case: Case, counts: Counts, folder: Path, taken: int) -> tuple[list[float], list[float]]:
    """Real and labelled tokens of every step; their means if a peer packs its own rows."""
    if peer.name == "ours":
        records = ours.metrics(folder)
        return [record["real_tokens"] for record in records], [record["labelled_tokens"] for record in records]
    if taken == len(counts.real):
        return list(counts.real), list(counts.labelled)
    return [sum(counts.real) / taken] * taken, [sum(counts.labelled) / taken] * taken


def weighted_mean(losses: list[float], weights: list[float]) -> float:
    """Mean over labelled tokens of all steps."""
    pairs = list(zip(losses, weights, strict=False))
    return sum(loss * weight for loss, weight in pairs) / sum(weight for _, weight in pairs)


def reason(finished: Finished, taken: int, limit_s: float) -> str:
    """Why a run gave no figures: the last line that looks like an error."""
    if finished.code is None:
        return f"cut off after {limit_s:.0f} s at step {taken}"
    # a launcher's message that its child failed explains nothing
    errors = [
        line for _, line in finished.lines if ("Error" in line or "error:" in line) and "CalledProcess" not in line
    ]
    last = [line for _, line in finished.lines if line.strip()]
    words = (errors or last or ["no output"])[-1].strip()
    return f"exit code {finished.code} after {taken} steps: {words[:REASON_CHARACTERS]}"
