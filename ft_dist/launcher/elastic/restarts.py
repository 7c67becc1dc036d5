"""Whether a run that failed is started again: how often, after what pause, and when its fault is its own."""

import json
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ft_dist.checkpoint.commit.format import commits
from ft_dist.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_HUNG, EXIT_PREEMPTED, EXIT_USER
from ft_dist.observe.files import last_record, tail

SAME_PLACE_TIMES = 3
LONGEST_PAUSE_S = 60.0


@dataclass(frozen=True)
class Verdict:
    """Start again after `pause_s`, or, where that is None, give up. `line` says it."""

    pause_s: float | None
    line: str
    own_fault: bool = False
    """The run would fail for ever"""


class RestartPolicy:
    """At most `max_restarts` restarts between two commits, with pauses of 1, 2, 4 .. s.

    Workers that fail SAME_PLACE_TIMES times after the same commit and the same step would fail for ever.
    """

    def __init__(self, max_restarts: int, run_dir: Path) -> None:
        self.max_restarts = max_restarts
        self.count = 0
        self._run_dir = run_dir
        self._commit = newest_commit(run_dir)
        self._places: list[tuple[int, int]] = []

    def after_failure(self, why: str, *, of_workers: bool) -> Verdict:
        """`why` names what failed; `of_workers` is False for a lost machine, which proves nothing about a step."""
        commit = newest_commit(self._run_dir)
        if commit != self._commit:
            self._commit, self.count, self._places = commit, 0, []
        step = last_step(self._run_dir)
        if of_workers:
            self._places.append((commit, step))
        if self._places.count((commit, step)) >= SAME_PLACE_TIMES:
            return Verdict(
                None,
                f"step {step + 1} failed {SAME_PLACE_TIMES} times in a row after the same commit "
                f"({_named(commit)}): a bug of data or code, not of a machine. {why}. "
                f"The whole story is in {self._run_dir / 'logs'}.",
                own_fault=True,
            )
        if self.count >= self.max_restarts:
            rule = f"--max-restarts {self.max_restarts}"
            after = f" after {self.count} restarts without a new commit ({rule})" if self.count else f" ({rule})"
            return Verdict(None, f"{why}; not started again{after}. The next start goes on from {_named(commit)}.")
        self.count += 1
        pause_s = min(2.0 ** (self.count - 1), LONGEST_PAUSE_S)
        return Verdict(
            pause_s,
            f"{why}; restart {self.count} of {self.max_restarts} in {pause_s:g} s goes on from {_named(commit)}",
        )


class Events:
    """The agent's lines in events.jsonl. They wait until rank 0 has made the folder: a run that never starts leaves
    none."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "events.jsonl"
        self._waiting: list[dict[str, Any]] = []

    def add(self, name: str, **fields: Any) -> None:
        self._waiting.append({"time": round(time.time(), 3), "event": name, **fields})
        self.flush()

    def flush(self) -> None:
        if self._waiting and self._path.exists():
            lines = "".join(json.dumps(event, ensure_ascii=False) + "\n" for event in self._waiting)
            # one write at the end of the file: rank 0 may write its own line meanwhile
            with suppress(OSError), self._path.open("a", encoding="utf-8") as file:
                file.write(lines)
                self._waiting = []


def combined(codes: Sequence[int]) -> int:
    """The code of the whole: the first of these that any worker gave, or 1 if one gave another.

    2, the user must mend something; 75, safe to requeue (workers leave with it when the run is committed or has not
    begun, whatever becomes of those that lose them); 76, one hung. 0 if all finished.
    """
    for code in (EXIT_USER, EXIT_PREEMPTED, EXIT_HUNG):
        if code in codes:
            return code
    return EXIT_FINISHED if all(code == EXIT_FINISHED for code in codes) else EXIT_FAILED


def newest_commit(run_dir: Path) -> int:
    """Step of the newest commit, 0 without one."""
    return max((commit.step for commit in commits(run_dir / "checkpoints")), default=0)


def last_step(run_dir: Path) -> int:
    """The last step in metrics.jsonl, 0 without one."""
    return int((last_record(run_dir / "metrics.jsonl") or {}).get("step", 0))


def told(rank: int, code: int, *, node: str, run_dir: Path, since: float) -> str:
    """How a worker ended, with the last line that it wrote after `since` (Unix seconds)."""
    where = f"rank {rank}" + (f" on {node}" if node else "")
    if code < 0:
        hint = " (the kernel does so when memory is short)" if -code == signal.SIGKILL else ""
        return f"{where} was killed by {signal.Signals(-code).name}{hint}"
    if code == EXIT_HUNG:
        return f"{where} made no progress; the stacks of all are in {run_dir / 'logs'}"
    log = run_dir / "logs" / f"rank-{rank}.log"
    with suppress(OSError):
        lines = [line for line in tail(log) if line.strip()]
        if lines and log.stat().st_mtime >= since:
            return f"{where} ended with {code}: {lines[-1].strip()[:500]}"
    return f"{where} ended with {code}"


def _named(commit: int) -> str:
    return f"the commit of step {commit}" if commit else "the beginning"
