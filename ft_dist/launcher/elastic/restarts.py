"""Whether to restart a failed run: how often, after what pause, and when the failure is the run's own."""

import json
import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ft_dist.checkpoint.commit.format import commits
from ft_dist.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_HUNG, EXIT_PREEMPTED, EXIT_USER, StorageError
from ft_dist.observe import files
from ft_dist.observe.patient import append_to
from ft_dist.run_folder import RunFolder

MAX_SAME_STEP_FAILURES = 3
LONGEST_PAUSE_S = 60.0


@dataclass(frozen=True)
class RestartDecision:
    """Restart after `pause_s` seconds, or give up if it is None. `line` is for the console."""

    pause_s: float | None
    line: str
    own_fault: bool = False
    """Every restart would fail at the same step"""


class RestartPolicy:
    """At most `max_restarts` restarts between two commits, with pauses of 1, 2, 4 .. s.

    Gives up earlier when workers fail MAX_SAME_STEP_FAILURES times at the same step after the same commit.
    """

    def __init__(self, max_restarts: int, run_dir: Path) -> None:
        self.max_restarts = max_restarts
        self.count = 0
        self._run_dir = run_dir
        self._commit = newest_commit(run_dir)
        self._failures: list[tuple[int, int]] = []

    def after_failure(self, why: str, *, of_workers: bool) -> RestartDecision:
        """`why` says what failed; `of_workers` is False for a lost machine, which says nothing about the step."""
        commit = newest_commit(self._run_dir, known=self._commit)
        if commit != self._commit:
            self._commit, self.count, self._failures = commit, 0, []
        step = last_step(self._run_dir)
        if of_workers:
            self._failures.append((commit, step))
        if self._failures.count((commit, step)) >= MAX_SAME_STEP_FAILURES:
            return RestartDecision(
                None,
                f"step {step + 1} failed {MAX_SAME_STEP_FAILURES} times in a row after the same commit "
                f"({_describe(commit)}), so the cause is the data or the code, not a machine. {why}. "
                f"See the logs in {self._run_dir / 'logs'}.",
                own_fault=True,
            )
        if self.count >= self.max_restarts:
            rule = f"--max-restarts {self.max_restarts}"
            after = f" after {self.count} restarts without a new commit ({rule})" if self.count else f" ({rule})"
            return RestartDecision(
                None, f"{why}; not restarted{after}. The next start resumes from {_describe(commit)}."
            )
        self.count += 1
        pause_s = min(2.0 ** (self.count - 1), LONGEST_PAUSE_S)
        return RestartDecision(
            pause_s,
            f"{why}; restart {self.count} of {self.max_restarts} in {pause_s:g} s resumes from {_describe(commit)}",
        )


class AgentEvents:
    """The agent's events in events.jsonl, held back until rank 0 has created the file, so that a run that never starts
    leaves no folder."""

    def __init__(self, run_dir: Path) -> None:
        self._path = RunFolder(run_dir).events
        self._waiting: list[dict[str, Any]] = []

    def add(self, name: str, **fields: Any) -> None:
        self._waiting.append(files.event_record(name, fields))
        self.flush()

    def flush(self) -> None:
        if not self._waiting:
            return
        with suppress(OSError):
            if not self._path.exists():
                return
            lines = "".join(json.dumps(event, ensure_ascii=False) + "\n" for event in self._waiting)
            # one appending write, since rank 0 may write a line in between
            append_to(self._path, lines.encode(errors="replace"))
            self._waiting = []


def combined_exit_code(codes: Sequence[int]) -> int:
    """The exit code of the run: the first of 2, 75 and 76 that any worker returned; else 0 if all finished, else 1.

    2: the user must fix something. 75: safe to requeue, since workers return it only if the run is committed or has
    not begun, even if their peers then fail. 76: a rank hung.
    """
    for code in (EXIT_USER, EXIT_PREEMPTED, EXIT_HUNG):
        if code in codes:
            return code
    return EXIT_FINISHED if all(code == EXIT_FINISHED for code in codes) else EXIT_FAILED


def newest_commit(run_dir: Path, *, known: int = 0) -> int:
    """Step of the newest commit, or 0; `known` if the file system does not answer, since the agent must not wait."""
    with suppress(StorageError):
        return max((commit.step for commit in commits(RunFolder(run_dir).checkpoints, wait_s=1.0)), default=0)
    return known


def last_step(run_dir: Path) -> int:
    """The last step in metrics.jsonl, or 0."""
    return files.last_step(RunFolder(run_dir).metrics)


def describe_exit(rank: int, code: int, *, node: str, run_dir: Path, since: float) -> str:
    """How a worker ended, with the last line that it logged after `since` (Unix seconds)."""
    where = f"rank {rank}" + (f" on {node}" if node else "")
    if code < 0:
        hint = " (the kernel does this when memory runs out)" if -code == signal.SIGKILL else ""
        names = {int(known): known.name for known in signal.Signals}
        return f"{where} was killed by {names.get(-code, f'signal {-code}')}{hint}"
    if code == EXIT_HUNG:
        return f"{where} made no progress; the stacks of all ranks are in {run_dir / 'logs'}"
    log = RunFolder(run_dir).rank_log(rank)
    with suppress(OSError):
        lines = [line for line in files.tail(log) if line.strip()]
        if lines and log.stat().st_mtime >= since:
            return f"{where} exited with {code}: {lines[-1].strip()[:500]}"
    return f"{where} exited with {code}"


def _describe(commit: int) -> str:
    return f"the commit of step {commit}" if commit else "the beginning"
