"""The ranks compare their facts: through their key-value store before they form a group, by a collective after.

Rank 0 finds the problems and publishes them, so that all ranks stop or continue together. On one node this takes about
0.1 s.
"""

import contextlib
import json
import os
import secrets
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ft_dist.config import RunConfig
from ft_dist.distributed import World, await_count, join_world
from ft_dist.errors import PreflightError
from ft_dist.network.open import open_store, several_nodes
from ft_dist.observe.console import Console
from ft_dist.preflight.facts import facts, gpu_facts
from ft_dist.preflight.interface import choose_interface
from ft_dist.preflight.node import node_name
from ft_dist.preflight.verdict import Facts, Problem, clock_problems, gpu_problems, problems, speed_problems

VISIBLE_S = 10.0
"""How long a shared file system may take to show another node's file"""
REPORT_INTERVAL_S = 30.0
ALL_REDUCE_ELEMENTS = {"cpu": 2**20, "cuda": 2**24}
REPEATS = 3
WORK_REPEATS = {"cpu": 200, "cuda": 20}
"""A tenth of a second, because a container's CPU limit does not slow bursts of milliseconds"""


def meet(config: RunConfig) -> dist.Store:
    """The ranks' shared store, over the network interface that they can use. Raises PreflightError, TrainingError."""
    choose_interface(node=node_name(), several_nodes=several_nodes())
    return open_store(timeout_s=config.collective_timeout_s)


def share_refusal(store: dist.Store, refusal: str, *, rank: int, size: int, timeout_s: float) -> str:
    """Rank 0's reason not to start, on every rank; "" if it has none. Rank 0 waits until the others know it."""
    refusals = dist.PrefixStore("refusal", store)
    if rank > 0:
        refusals.wait(["reason"], timedelta(seconds=timeout_s))
        reason = refusals.get("reason").decode()
        refusals.add("read", 1)
        return reason
    refusals.set("reason", refusal)
    if refusal:
        await_count(refusals, "read", size - 1)
    return refusal


def form_world(config: RunConfig, store: dist.Store, *, rank: int, size: int) -> tuple[World, list[str]]:
    """Join the world after all ranks pass; returns it with a line for the console. Raises PreflightError."""
    timeout_s = config.collective_timeout_s
    console = Console(enabled=rank == 0)
    if size == 1:
        # after a device error, the agent restarts the rank on the same GPU
        own = {"node": node_name(), "rank": 0, "gpu": gpu_facts(int(os.environ.get("LOCAL_RANK", 0)))}
        for problem in gpu_problems(own):
            if problem.fatal:
                raise PreflightError(problem.line)
            console.note(problem.line)
        return join_world(store, timeout_s=timeout_s), []
    preflight = Preflight(config, store, rank=rank, size=size, timeout_s=timeout_s, say=console.say)
    preflight.compare()
    world = join_world(store, timeout_s=timeout_s)
    line = preflight.measure(world, speed=several_nodes())
    for problem in preflight.found:
        console.note(problem.line)
    return world, [line]


class Preflight:
    """One per rank. All ranks call `compare` before the process group exists and `measure` after."""

    def __init__(
        self,
        config: RunConfig,
        store: dist.Store,
        *,
        rank: int,
        size: int,
        timeout_s: float,
        say: Callable[[str], None],
    ) -> None:
        self._config, self._rank, self._size = config, rank, size
        self._store = dist.PrefixStore("preflight", store)
        self._timeout = timedelta(seconds=timeout_s)
        self._say = say
        self._ranks: list[Facts] = []
        self.found: list[Problem] = []
        """Problems that rank 0 has published so far"""

    def compare(self) -> None:
        """Compare code, config and environment. Raises PreflightError if they differ too much or ranks are missing."""
        own = facts(self._config, rank=self._rank, size=self._size)
        with self._token() as seen:
            self._put(f"facts/{self._rank}", own | {"sees_output": seen, "output_dir": str(self._config.run_dir)})
            found: list[Problem] = []
            if self._rank == 0:
                self._ranks = [self._await_facts(rank) for rank in range(self._size)]
                found = problems(self._ranks)
            found += self._compare_clocks()
            self._agree("compared", found)

    def measure(self, world: World, *, speed: bool) -> str:
        """Check and time an all-reduce, and with `speed` find slow ranks; returns a line for the console."""
        elements = ALL_REDUCE_ELEMENTS[world.device.type]
        pattern = torch.arange(elements, device=world.device, dtype=torch.float32) % 7
        # whole numbers far below 2**24: exact in any order of summation
        expected = pattern * (self._size * (self._size + 1) // 2)
        seconds = []
        right = True
        for _ in range(1 + REPEATS):
            values = pattern * (self._rank + 1)
            started = time.perf_counter()
            dist.all_reduce(values)
            right &= bool(torch.equal(values, expected))  # waits for the GPU
            seconds.append(time.perf_counter() - started)
        work_s = _work(world.device) if speed else 0.0
        self._put(f"measured/{self._rank}", {"right": right, "work_s": work_s})
        found: list[Problem] = []
        if self._rank == 0:
            measured = [self._get(f"measured/{rank}") for rank in range(self._size)]
            found = [
                Problem(
                    f"{own['node']}: the sum of an all-reduce is wrong on rank {own['rank']}. Exclude the node, or "
                    "change the network library's settings (NCCL_*).",
                    fatal=True,
                )
                for own, result in zip(self._ranks, measured, strict=True)
                if not result["right"]
            ]
            if speed:
                found += speed_problems(self._ranks, [result["work_s"] for result in measured])
        self._agree("measured", found)
        # bytes that cross a link, as defined by NVIDIA's nccl-tests
        rate = 4 * elements * 2 * (self._size - 1) / self._size / min(seconds[1:])
        over = f" over {os.environ['GLOO_SOCKET_IFNAME']}" if "GLOO_SOCKET_IFNAME" in os.environ else ""
        return f"preflight: {self._size} ranks agree; all-reduce {rate / 1e9:.2f} GB/s{over}"

    @contextlib.contextmanager
    def _token(self) -> Any:
        """Rank 0 writes a file in output_dir; yields True if this rank sees it."""
        folder = self._config.run_dir
        if self._rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            token = folder / f".preflight-{secrets.token_hex(4)}"
            token.touch()
            self._put("token", {"name": token.name})
            try:
                yield True
            finally:
                token.unlink(missing_ok=True)
            return
        yield _appears(folder / self._get("token")["name"])

    def _await_facts(self, rank: int) -> Facts:
        key, started = f"facts/{rank}", time.monotonic()
        reported_at = started
        while not self._store.check([key]):
            now = time.monotonic()
            if now - started > self._timeout.total_seconds():
                missing = [other for other in range(self._size) if not self._store.check([f"facts/{other}"])]
                raise PreflightError(
                    f"{node_name()}: WORLD_SIZE={self._size}, but ranks {missing} did not join within "
                    f"{now - started:.0f} s. Start WORLD_SIZE processes, and see the logs of the missing ones."
                )
            if now - reported_at > REPORT_INTERVAL_S:
                reported_at = now
                self._say(f"waiting for rank {rank} of {self._size}")
            time.sleep(0.005)
        return self._get(key)

    def _compare_clocks(self) -> list[Problem]:
        """Every rank reads its clock between two readings of rank 0's clock."""
        if self._rank > 0:
            self._get("clock")
            self._put(f"clock/{self._rank}", {"time": time.time()})
            return []
        before = time.time()
        self._put("clock", {})
        theirs = [before, *(self._get(f"clock/{rank}")["time"] for rank in range(1, self._size))]
        half = (time.time() - before) / 2
        skews = [0.0, *(other - (before + half) for other in theirs[1:])]
        return clock_problems(self._ranks, skews, half)

    def _agree(self, key: str, found: list[Problem]) -> None:
        if self._rank == 0:
            self._put(key, [[problem.line, problem.fatal] for problem in found])
        published = [Problem(line, fatal) for line, fatal in self._get(key)]
        self.found += published
        self._store.add(f"{key}/read", 1)
        if self._rank == 0:
            await_count(self._store, f"{key}/read", self._size)
        if any(problem.fatal for problem in published):
            raise PreflightError(" ".join(problem.line for problem in published if problem.fatal))

    def _put(self, key: str, content: Any) -> None:
        self._store.set(key, json.dumps(content))

    def _get(self, key: str) -> Any:
        self._store.wait([key], self._timeout)
        return json.loads(self._store.get(key))


def _work(device: torch.device) -> float:
    """Seconds for a fixed number of matrix products, the same on every rank."""
    width = 384 if device.type == "cpu" else 4096
    matrix = torch.ones(width, width, device=device)
    (matrix @ matrix)[0, 0].item()  # the first one also loads the library
    started = time.perf_counter()
    for _ in range(WORK_REPEATS[device.type]):
        (matrix @ matrix)[0, 0].item()
    return time.perf_counter() - started


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + VISIBLE_S
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        with contextlib.suppress(OSError):
            os.listdir(path.parent)  # makes NFS look again
        time.sleep(0.05)
    return True
