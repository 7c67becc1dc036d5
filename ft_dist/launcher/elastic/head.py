"""The head: which machines make up the world of each round, and what follows when a round ends.

A round is one life of the workers. It ends when all have; a worker that fails takes the others down, since they would
wait for it in a collective. Between rounds the world is formed anew from the machines that are there: all that were
asked for, or at least `minimum` once those that may still come have had SETTLE_S. The head runs inside the agent of the
machine that holds rank 0; if that machine is lost, so is the run's meeting place.
"""

import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ft_dist.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_HUNG, EXIT_PREEMPTED, EXIT_USER
from ft_dist.launcher.elastic.restarts import Events, RestartPolicy, combined, newest_commit, told
from ft_dist.launcher.elastic.workers import Share

SETTLE_S = 10.0
"""How long a world that could already start waits for the machines that are still missing"""
RESETTLE_S = 3.0
NOTICES_S = 2.0
"""Machines that are told to leave together hear it within this time"""
TELL_INTERVAL_S = 30.0
WATCH_INTERVAL_S = 1.0


@dataclass(eq=False)
class Member:
    """A machine's agent. `send` takes a message for it: start, signal, stop, over."""

    name: str
    nproc: int
    send: Callable[[dict[str, Any]], None]
    leaving: bool = False
    """Told to leave by a signal of its own"""


@dataclass
class Round:
    number: int
    members: list[Member]
    started: float
    open: dict[int, Member]
    """The ranks that have not ended"""
    codes: dict[int, int] = field(default_factory=dict)
    why: str = ""
    """The first failure"""
    lost: list[str] = field(default_factory=list)
    stopping: bool = False
    leaving: bool = False
    growing: str = ""
    """The machine for which a commit was asked"""


class Head:
    """Fed by `join`, `lose`, `leave` and `worker_ended`; `tick` does what is due. `over` is the run's exit code."""

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
        """`master` gives the address and a free port for rank 0. Without `grows_at_commits` there are no commits to
        wait for when a machine joins."""
        self.over: int | None = None
        self.events = Events(run_dir)
        self._minimum, self._maximum = minimum, maximum
        self._policy, self._run_dir = policy, run_dir
        self._grows_at_commits = grows_at_commits
        self._join_timeout_s = join_timeout_s
        self._master = master
        self._say = say
        self._members: list[Member] = []
        self._gone: list[str] = []
        self._round: Round | None = None
        self._rounds = 0
        self._nodes = maximum
        self._forming_since = self._told_at = time.monotonic()
        self._start_at = 0.0
        self._decide_at: float | None = None
        self._joined_after: int | None = None
        self._watched_at = 0.0

    def join(self, member: Member) -> None:
        """The first member is the head's own machine, and holds rank 0."""
        self._members.append(member)
        if member.name in self._gone:
            self._gone.remove(member.name)
        if self._round and len(self._round.members) < self._maximum:
            when = "after the next commit" if self._grows_at_commits else "after this step"
            self._say(f"{member.name} is here: the world grows {when}")
            self._joined_after = newest_commit(self._run_dir)

    def lose(self, member: Member, why: str) -> None:
        """A machine is gone, whatever ran there."""
        if member not in self._members:
            return
        self._members.remove(member)
        self._gone.append(member.name)
        if not self._round or member not in self._round.members:
            return
        self._say(f"{member.name} is lost: {why}")
        self._round.lost.append(member.name)
        for rank in [rank for rank, owner in self._round.open.items() if owner is member]:
            del self._round.open[rank]
        self._stop()

    def leave(self, member: Member, number: int) -> None:
        """A machine's agent was sent a signal, which its own workers have from it."""
        member.leaving = True
        if self._round is None and member is self._members[0]:
            self._end(EXIT_PREEMPTED, f"stopped by {signal.Signals(number).name} between two starts of the workers")

    def worker_ended(self, member: Member, number: int, rank: int, code: int | None) -> None:
        """`code` is None where it was killed because others had failed."""
        current = self._round
        if current is None or current.number != number or rank not in current.open:
            return
        del current.open[rank]
        if code is None:
            return
        current.codes[rank] = code
        if code == EXIT_PREEMPTED and not current.leaving:
            # it was told by others, so the run is committed or has not begun; the rest may wait for it
            current.leaving = True
            self._signal(signal.SIGTERM, but_for_told=True)
        elif code not in (EXIT_FINISHED, EXIT_PREEMPTED):
            if code == EXIT_HUNG:
                # one that is stopped must go on in order to answer
                self._signal(signal.SIGQUIT)
                self._signal(signal.SIGCONT)
            if not current.why:
                node = member.name if self._maximum > 1 else ""
                current.why = told(rank, code, node=node, run_dir=self._run_dir, since=current.started)
            self._stop()

    def tick(self) -> None:
        self.events.flush()
        if self.over is not None:
            return
        if self._round and not self._round.open:
            self._close_round(self._round)
        elif self._round:
            self._watch_for_growth(self._round)
        else:
            self._form()

    def _form(self) -> None:
        now = time.monotonic()
        here = [member for member in self._members if not member.leaving][: self._maximum]
        waited_s = now - self._forming_since
        if now < self._start_at:
            return
        settle_s = RESETTLE_S if self._rounds else SETTLE_S
        if len(here) == self._maximum or (len(here) >= self._minimum and waited_s >= settle_s):
            self._start(here)
        elif len(here) < self._minimum and waited_s >= self._join_timeout_s:
            self._end(EXIT_FAILED, f"error: {self._missing(here)} within {self._join_timeout_s:.0f} s.")
        elif len(here) < self._minimum and now - self._told_at >= TELL_INTERVAL_S:
            self._told_at = now
            self._say(f"waiting: {self._missing(here)}")

    def _missing(self, here: list[Member]) -> str:
        names = ", ".join(member.name for member in here)
        lost = f"; lost: {', '.join(self._gone)}" if self._gone else ""
        return f"{len(here)} of {self._minimum} nodes are here ({names}), {self._minimum - len(here)} missing{lost}"

    def _start(self, members: list[Member]) -> None:
        self._rounds += 1
        ranks = [member for member in members for _ in range(member.nproc)]
        if len(members) != self._nodes:
            fewer = f": {self._maximum} were asked for" if len(members) < self._maximum else ""
            self._say(f"the world is {len(members)} nodes and {len(ranks)} ranks{fewer}")
            names = [member.name for member in members]
            self.events.add("world", nodes=names, asked=self._maximum, world_size=len(ranks), lost=list(self._gone))
            self._nodes = len(members)
        self._round = Round(self._rounds, members, time.time(), dict(enumerate(ranks)))
        self._joined_after = None
        address, port = self._master() if len(members) > 1 else ("127.0.0.1", self._master()[1])
        first = 0
        for index, member in enumerate(members):
            share = Share(self._rounds, first, member.nproc, len(ranks), index, len(members), address, port)
            member.send({"type": "start", "share": asdict(share)})
            first += member.nproc
        waiting = [member.name for member in self._members if member not in members and not member.leaving]
        if waiting and len(members) == self._maximum:
            self._say(f"{', '.join(waiting)}: not needed, waits as a spare")

    def _watch_for_growth(self, current: Round) -> None:
        """Once a commit is there that a machine has waited for: ask the workers to commit, leave, and start with it."""
        now = time.monotonic()
        waiting = [member for member in self._members if member not in current.members and not member.leaving]
        full = len(current.members) == self._maximum
        if full or not waiting or current.growing or current.stopping or now - self._watched_at < WATCH_INTERVAL_S:
            return
        self._watched_at = now
        if self._joined_after is None:
            self._joined_after = newest_commit(self._run_dir)
        if not self._grows_at_commits or newest_commit(self._run_dir) > self._joined_after:
            current.growing = ", ".join(member.name for member in waiting)
            current.leaving = True
            self._signal(signal.SIGTERM)

    def _close_round(self, ended: Round) -> None:
        code = combined(list(ended.codes.values()))
        leaving = [member for member in self._members if member.leaving]
        if code == EXIT_USER or (code == EXIT_FINISHED and 0 in ended.codes):
            self._end(code)
        elif leaving:
            self._close_after_notice(leaving, EXIT_PREEMPTED if ended.lost else code)
        elif ended.lost:
            self._restart(f"{', '.join(ended.lost)} lost", of_workers=False)
        elif code == EXIT_PREEMPTED and ended.growing:
            self._again(f"{ended.growing} joined the world")
        elif code == EXIT_PREEMPTED:
            self._end(code)
        else:
            self._restart(ended.why, of_workers=True, code=code)

    def _close_after_notice(self, leaving: list[Member], code: int) -> None:
        """A notice to some machines of an elastic world leaves it to the others; to all, or to the head, ends it."""
        now = time.monotonic()
        if len(self._members) - len(leaving) < self._minimum or self._members[0].leaving:
            self._end(code)
        elif self._decide_at is None:
            self._decide_at = now + NOTICES_S
        elif now >= self._decide_at:
            self._decide_at = None
            for member in leaving:
                member.send({"type": "over", "code": EXIT_PREEMPTED, "why": "the others go on"})
                self._members.remove(member)
                self._gone.append(member.name)
            self._again(f"{', '.join(member.name for member in leaving)} left the world")

    def _restart(self, why: str, *, of_workers: bool, code: int = EXIT_FAILED) -> None:
        verdict = self._policy.after_failure(why, of_workers=of_workers)
        if verdict.pause_s is None:
            self._end(EXIT_FAILED if verdict.own_fault else code, f"error: {verdict.line}")
            return
        self._say(verdict.line)
        self.events.add("restarted", why=why, count=self._policy.count, of=self._policy.max_restarts)
        self._form_again(verdict.pause_s)

    def _again(self, why: str) -> None:
        self._say(f"{why}: the workers start again")
        self.events.add("restarted", why=why, count=self._policy.count, of=self._policy.max_restarts)
        self._form_again(0.0)

    def _form_again(self, pause_s: float) -> None:
        self._round = None
        now = time.monotonic()
        self._forming_since = self._told_at = now
        self._start_at = now + pause_s

    def _signal(self, number: int, *, but_for_told: bool = False) -> None:
        assert self._round
        for member in self._round.members:
            # a second signal would end workers that commit for the first
            if member in self._members and not (but_for_told and member.leaving):
                member.send({"type": "signal", "round": self._round.number, "number": int(number)})

    def _stop(self) -> None:
        assert self._round
        if not self._round.stopping:
            self._round.stopping = True
            for member in self._round.members:
                if member in self._members:
                    member.send({"type": "stop", "round": self._round.number})

    def _end(self, code: int, line: str = "") -> None:
        if line:
            self._say(line)
        self.over = code
        for member in self._members:
            member.send({"type": "over", "code": code, "why": line})
