"""The head: decides which nodes form the world of each round, and what to do when a round ends.

A round is one start of the workers, and ends when all of them have. If a worker fails, the others are stopped, since
they would wait for it in a collective. Each round forms its world from the nodes that are present: all that were
requested, or at least `minimum` after SETTLE_S in which the others may still join. The head runs in the agent of the
node that holds rank 0; if that node is lost, so is the rendezvous.
"""

import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ft_dist.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_HUNG, EXIT_PREEMPTED, EXIT_USER, counted
from ft_dist.launcher.elastic.messages import LONGEST_TEXT
from ft_dist.launcher.elastic.restarts import (
    AgentEvents,
    RestartPolicy,
    combined_exit_code,
    describe_exit,
    newest_commit,
)
from ft_dist.launcher.elastic.workers import Share

SETTLE_S = 10.0
"""How long a world that could already start waits for missing nodes"""
RESETTLE_S = 3.0
"""The same, before every later round"""
NOTICES_S = 2.0
"""Nodes that are preempted together get their notices within this time"""
LOG_INTERVAL_S = 30.0
WATCH_INTERVAL_S = 1.0


@dataclass(eq=False)
class Node:
    """One machine, reached through its agent. `send` sends it a message: start, signal, stop, over."""

    name: str
    nproc: int
    send: Callable[[dict[str, Any]], None]
    leaving: bool = False
    """Its agent was sent a signal to leave"""


@dataclass
class Round:
    number: int
    nodes: list[Node]
    started: float
    running: dict[int, Node]
    """The ranks that have not ended"""
    codes: dict[int, int] = field(default_factory=dict)
    why: str = ""
    """The first failure"""
    lost: list[str] = field(default_factory=list)
    stopping: bool = False
    leaving: bool = False
    growing: str = ""
    """The nodes for which the workers were asked to commit and leave"""


class Head:
    """Driven by `join`, `lose`, `leave`, `worker_ended` and periodic `tick`. `over`: the run's exit code."""

    def __init__(
        self,
        *,
        minimum: int,
        maximum: int,
        policy: RestartPolicy,
        run_dir: Path,
        grows_at_commits: bool,
        join_timeout_s: float,
        master: Callable[[], tuple[str, int]],
        say: Callable[[str], None],
    ) -> None:
        """`master` returns the address and a free port for rank 0. With `grows_at_commits`, a node that joins waits for
        the next commit; a run that never commits lets it join after the current step."""
        self.over: int | None = None
        self.events = AgentEvents(run_dir)
        self._minimum, self._maximum = minimum, maximum
        self._policy, self._run_dir = policy, run_dir
        self._grows_at_commits = grows_at_commits
        self._join_timeout_s = join_timeout_s
        self._master = master
        self._say = say
        self._nodes: list[Node] = []
        self._gone: list[str] = []
        self._round: Round | None = None
        self._rounds = 0
        self._last_size = maximum
        self._forming_since = self._logged_at = time.monotonic()
        self._start_at = 0.0
        self._decide_at: float | None = None
        self._joined_after: int | None = None
        self._watched_at = 0.0

    def join(self, node: Node) -> None:
        """The first node is the head's own machine, and holds rank 0."""
        self._nodes.append(node)
        if node.name in self._gone:
            self._gone.remove(node.name)
        if self._round and len(self._round.nodes) < self._maximum:
            when = "after the next commit" if self._grows_at_commits else "after this step"
            self._say(f"{node.name} joined; the world grows {when}")
            self._joined_after = newest_commit(self._run_dir, known=self._joined_after or 0)

    def lose(self, node: Node, why: str) -> None:
        """A node is gone, with everything that ran on it."""
        if node not in self._nodes:
            return
        self._nodes.remove(node)
        self._gone.append(node.name)
        if not self._round or node not in self._round.nodes:
            return
        self._say(f"{node.name} is lost: {why}")
        self._round.lost.append(node.name)
        for rank in [rank for rank, owner in self._round.running.items() if owner is node]:
            del self._round.running[rank]
        self._stop()

    def leave(self, node: Node, number: int) -> None:
        """A node's agent was sent a signal, and has forwarded it to its own workers."""
        node.leaving = True
        if self._round is None and node is self._nodes[0]:
            self._end(EXIT_PREEMPTED, f"stopped by {signal.Signals(number).name} while no workers were running")

    def worker_ended(self, node: Node, number: int, rank: int, code: int | None) -> None:
        """`code` is None if the agent killed the worker because others had failed. Ignores ranks of other nodes."""
        current = self._round
        # a node speaks for its own ranks only
        if current is None or current.number != number or current.running.get(rank) is not node:
            return
        del current.running[rank]
        if code is None:
            return
        current.codes[rank] = code
        if code == EXIT_PREEMPTED and not current.leaving:
            # the head did not signal it; the run is committed or has not begun, and other ranks may wait
            current.leaving = True
            self._signal(signal.SIGTERM, skip_leaving=True)
        elif code not in (EXIT_FINISHED, EXIT_PREEMPTED):
            if code == EXIT_HUNG:
                # a stopped process must continue in order to write its stacks
                self._signal(signal.SIGQUIT)
                self._signal(signal.SIGCONT)
            if not current.why:
                name = node.name if self._maximum > 1 else ""
                current.why = describe_exit(rank, code, node=name, run_dir=self._run_dir, since=current.started)
            self._stop()

    def tick(self) -> None:
        self.events.flush()
        if self.over is not None:
            return
        if self._round and not self._round.running:
            self._close_round(self._round)
        elif self._round:
            self._watch_for_growth(self._round)
        else:
            self._form()

    def _form(self) -> None:
        now = time.monotonic()
        here = [node for node in self._nodes if not node.leaving][: self._maximum]
        waited_s = now - self._forming_since
        if now < self._start_at:
            return
        settle_s = RESETTLE_S if self._rounds else SETTLE_S
        if len(here) == self._maximum or (len(here) >= self._minimum and waited_s >= settle_s):
            self._start(here)
        elif len(here) < self._minimum and waited_s >= self._join_timeout_s:
            self._end(EXIT_FAILED, f"error: {self._missing(here)} within {self._join_timeout_s:.0f} s.")
        elif len(here) < self._minimum and now - self._logged_at >= LOG_INTERVAL_S:
            self._logged_at = now
            self._say(f"waiting: {self._missing(here)}")

    def _missing(self, here: list[Node]) -> str:
        names = ", ".join(node.name for node in here)
        lost = f"; lost: {', '.join(self._gone)}" if self._gone else ""
        return f"{len(here)} of {self._minimum} nodes joined ({names}), {self._minimum - len(here)} missing{lost}"

    def _start(self, nodes: list[Node]) -> None:
        self._rounds += 1
        ranks = [node for node in nodes for _ in range(node.nproc)]
        if len(nodes) != self._last_size:
            fewer = f": {self._maximum} were requested" if len(nodes) < self._maximum else ""
            self._say(f"the world has {counted(len(nodes), 'node')} and {counted(len(ranks), 'rank')}{fewer}")
            names = [node.name for node in nodes]
            self.events.add("world", nodes=names, asked=self._maximum, world_size=len(ranks), lost=list(self._gone))
            self._last_size = len(nodes)
        self._round = Round(self._rounds, nodes, time.time(), dict(enumerate(ranks)))
        self._joined_after = None
        address, port = self._master() if len(nodes) > 1 else ("127.0.0.1", self._master()[1])
        first = 0
        for index, node in enumerate(nodes):
            share = Share(self._rounds, first, node.nproc, len(ranks), index, len(nodes), address, port)
            node.send({"type": "start", "share": asdict(share)})
            first += node.nproc
        waiting = [node.name for node in self._nodes if node not in nodes and not node.leaving]
        if waiting and len(nodes) == self._maximum:
            self._say(f"{', '.join(waiting)}: not needed, waiting as a spare")

    def _watch_for_growth(self, current: Round) -> None:
        """If a node waits to join and a new commit exists, ask the workers to commit and leave, to restart with it."""
        now = time.monotonic()
        waiting = [node for node in self._nodes if node not in current.nodes and not node.leaving]
        full = len(current.nodes) == self._maximum
        if full or not waiting or current.growing or current.stopping or now - self._watched_at < WATCH_INTERVAL_S:
            return
        self._watched_at = now
        if self._joined_after is None:
            self._joined_after = newest_commit(self._run_dir)
        if not self._grows_at_commits or newest_commit(self._run_dir, known=self._joined_after) > self._joined_after:
            current.growing = ", ".join(node.name for node in waiting)
            current.leaving = True
            self._signal(signal.SIGTERM)

    def _close_round(self, ended: Round) -> None:
        code = combined_exit_code(list(ended.codes.values()))
        leaving = [node for node in self._nodes if node.leaving]
        if code == EXIT_USER or (code == EXIT_FINISHED and 0 in ended.codes):
            self._end(code)
        elif leaving:
            self._close_after_notice(leaving, EXIT_PREEMPTED if ended.lost else code)
        elif ended.lost:
            self._restart(f"{', '.join(ended.lost)} lost", of_workers=False)
        elif code == EXIT_PREEMPTED and ended.growing:
            self._restart_resized(f"{ended.growing} joined the world")
        elif code == EXIT_PREEMPTED:
            self._end(code)
        else:
            self._restart(ended.why, of_workers=True, code=code)

    def _close_after_notice(self, leaving: list[Node], code: int) -> None:
        """Some nodes were asked to leave: continue with the others if they suffice and include the head, else end."""
        now = time.monotonic()
        if len(self._nodes) - len(leaving) < self._minimum or self._nodes[0].leaving:
            self._end(code)
        elif self._decide_at is None:
            self._decide_at = now + NOTICES_S
        elif now >= self._decide_at:
            self._decide_at = None
            for node in leaving:
                node.send({"type": "over", "code": EXIT_PREEMPTED, "why": "the other nodes continue"})
                self._nodes.remove(node)
                self._gone.append(node.name)
            self._restart_resized(f"{', '.join(node.name for node in leaving)} left the world")

    def _restart(self, why: str, *, of_workers: bool, code: int = EXIT_FAILED) -> None:
        decision = self._policy.after_failure(why, of_workers=of_workers)
        if decision.pause_s is None:
            self._end(EXIT_FAILED if decision.own_fault else code, f"error: {decision.line}")
            return
        self._say(decision.line)
        self.events.add("restarted", why=why, count=self._policy.count, of=self._policy.max_restarts)
        self._begin_forming(decision.pause_s)

    def _restart_resized(self, why: str) -> None:
        self._say(f"{why}: restarting the workers")
        self.events.add("restarted", why=why, count=self._policy.count, of=self._policy.max_restarts)
        self._begin_forming(0.0)

    def _begin_forming(self, pause_s: float) -> None:
        self._round = None
        now = time.monotonic()
        self._forming_since = self._logged_at = now
        self._start_at = now + pause_s

    def _signal(self, number: int, *, skip_leaving: bool = False) -> None:
        assert self._round
        for node in self._round.nodes:
            # a second signal would end workers that are committing because of the first
            if node in self._nodes and not (skip_leaving and node.leaving):
                node.send({"type": "signal", "round": self._round.number, "number": int(number)})

    def _stop(self) -> None:
        assert self._round
        if not self._round.stopping:
            self._round.stopping = True
            for node in self._round.nodes:
                if node in self._nodes:
                    node.send({"type": "stop", "round": self._round.number})

    def _end(self, code: int, line: str = "") -> None:
        if line:
            self._say(line)
        self.over = code
        for node in self._nodes:
            node.send({"type": "over", "code": code, "why": line[:LONGEST_TEXT]})
