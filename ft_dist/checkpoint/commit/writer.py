"""Saves in the background: training continues immediately, and its next update waits only for the copy of its state.

Only an update changes the saved state. So a thread copies it to host memory during the next forward and backward, and
the update waits for `wait_until_copied`. The thread then writes and syncs the rank's file in a staging folder and posts
its fingerprint to the ranks' common key-value store, without any collective. Rank 0's thread waits for all posts, adds
state and manifest, and renames the folder, which makes it a commit. A process that dies leaves a staging folder, which
the next run removes. A failed save loses that checkpoint, not the run; `new_events` reports it at the next step.
"""

import contextlib
import json
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from ft_dist.checkpoint.commit import format as layout
from ft_dist.checkpoint.commit.mirror import Mirror
from ft_dist.checkpoint.commit.retention import Retention
from ft_dist.checkpoint.commit.save_event import SaveEvent
from ft_dist.checkpoint.commit.snapshot import HostBuffer, Snapshot, TensorSource
from ft_dist.distributed import World, control_store
from ft_dist.errors import CheckpointError, StorageError

STAGING = ".saving-"
_GRACE_S = 30.0
"""How long a failing run waits for the other ranks' files of a save in flight"""
_RETRIES_S = (0.5, 1.0, 2.0)
"""Pauses before a write that fails is repeated; training continues meanwhile"""
_VISIBLE_S = 20.0
"""How long a shared file system may take to show another rank's file"""


class CheckpointWriter:
    """One per rank for the whole run; all ranks create it at the same point. At most one save is in flight."""

    def __init__(
        self, root: Path, world: World, *, retention: Retention, mirror: Mirror | None = None, timeout_s: float
    ) -> None:
        """Removes the remains of killed saves. Raises CheckpointError if the ranks do not share `root`."""
        self.root = root
        self._world = world
        self._retention = retention
        self._mirror = mirror
        self._timeout_s = timeout_s
        self._buffer = HostBuffer(world.device)
        self._thread: threading.Thread | None = None
        self._hurry = threading.Event()
        """The next save waits: do not repeat the writes of this one"""
        self._copied = threading.Event()
        self._copied.set()
        self._last_step = -1
        self._saves = 0
        self.failed = False
        """Whether the last save that ended has failed. Known on rank 0 only."""
        self._events: list[SaveEvent] = []
        self._lock = threading.Lock()
        self._closing_at: float | None = None
        self._reported_full = False
        self._attempt = ""
        self._agree_on_attempt()

    def save(
        self,
        tensors: Mapping[str, TensorSource],
        *,
        step: int,
        state: dict[str, Any],
        held_out_losses: Mapping[int, float] | None = None,
        again: bool = False,
    ) -> None:
        """Save this rank's `tensors` and rank 0's JSON `state`; all ranks call it with the same `step`.

        The tensors must not change until `wait_until_copied` returns; the state must never. First waits for a save
        still in flight, and reports the wait. A second call for the same step does nothing, unless `again`.
        """
        if step == self._last_step and not again:
            return
        self._hurry.set()
        waited_s = self._wait_for_previous()
        self._hurry.clear()
        if waited_s > 0.05:
            note = f"the save of step {step} waited {waited_s:.1f} s for the save of step {self._last_step}"
            self._add_event(SaveEvent("save_waited", step, {"seconds": round(waited_s, 3)}, note))
        self._last_step = step
        self._saves += 1
        request = _Save(self._saves, step, state, dict(held_out_losses or {}), time.monotonic())
        self._copied.clear()
        self._thread = threading.Thread(target=self._run, args=(request, tensors), name="checkpoint", daemon=True)
        self._thread.start()

    def wait_until_copied(self) -> float:
        """Wait until the tensors of the last save may change; returns the seconds waited."""
        started = time.monotonic()
        self._copied.wait()
        return time.monotonic() - started

    def new_events(self) -> list[SaveEvent]:
        """Events since the last call."""
        with self._lock:
            found, self._events = self._events, []
        return found + (self._mirror.new_events() if self._mirror else [])

    def wait(self) -> None:
        """Wait until no save is in flight: the last one is a commit, or `new_events` holds its failure."""
        self._wait_for_previous()

    def is_committed(self, step: int) -> bool:
        with contextlib.suppress(OSError):
            return (layout.step_folder(self.root, step) / layout.MANIFEST).is_file()
        return False

    def close(self) -> None:
        """Like `wait`, and also for the mirror; waits a bounded time for other ranks, which may be gone."""
        self._closing_at = time.monotonic()
        self.wait()
        if self._world.is_main:
            with contextlib.suppress(OSError):
                self._probe().unlink(missing_ok=True)
        if self._mirror:
            self._mirror.close()

    def _wait_for_previous(self) -> float:
        if self._thread is None:
            return 0.0
        started = time.monotonic()
        self._thread.join()
        self._thread = None
        return time.monotonic() - started

    def _run(self, request: "_Save", tensors: Mapping[str, TensorSource]) -> None:
        staging = self.root / f"{layout.step_name(request.step)}{STAGING}{self._attempt}"
        self._post(request.number, self._save(tensors, staging))
        if not self._world.is_main:
            return
        try:
            folder, size = self._seal(request, staging)
        except (OSError, CheckpointError) as error:
            shutil.rmtree(staging, ignore_errors=True)
            note = (
                f"step {request.step} was not saved: {error} Training continues; the next save tries again, "
                f"and a restart would resume from {self._newest()}."
            )
            self._add_event(SaveEvent("save_failed", request.step, {"reason": str(error)}, note))
            self.failed = True
            return
        self.failed = False
        seconds = time.monotonic() - request.started
        self._add_event(SaveEvent("saved", request.step, {"seconds": round(seconds, 3), "bytes": size}))
        if self._mirror:
            self._mirror.offer(layout.Commit(folder, request.step), losses=request.losses)
        with contextlib.suppress(OSError, StorageError):  # what stays is deleted after the next save
            self._tidy(request, size)

    def _save(self, tensors: Mapping[str, TensorSource], staging: Path) -> dict[str, Any]:
        """Copy, then write; returns the post: the fingerprint of this rank's file, or the error."""
        try:
            snapshot = self._buffer.snapshot(tensors)
        except Exception as error:  # usually too little host memory, for which torch raises a RuntimeError
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            return {"error": f"rank {self._world.rank} could not copy its state to host memory ({reason})."}
        finally:
            self._copied.set()
        path = staging / layout.rank_name(self._world.rank)
        try:
            return {"name": path.name, **self._repeated(lambda: self._write(snapshot, path))}
        except CheckpointError as error:
            return {"error": str(error)}
        except OSError as error:
            return {"error": f"{path}: cannot be written ({error.strerror})."}

    def _write(self, snapshot: Snapshot, path: Path) -> layout.Fingerprint:
        path.parent.mkdir(parents=True, exist_ok=True)
        needed, free = snapshot.size_bytes * self._world.local_size, shutil.disk_usage(self.root).free
        if free < needed:
            raise CheckpointError(f"{self.root}: {_gigabytes(needed)} needed, {_gigabytes(free)} free on its disk.")
        return snapshot.write(path)

    def _repeated(self, write: Callable[[], layout.Fingerprint]) -> layout.Fingerprint:
        """What `write` returns; repeats it after an OSError, unless the run ends or the next save waits."""
        for pause_s in _RETRIES_S:
            try:
                return write()
            except OSError:
                if self._closing_at is not None or self._hurry.wait(pause_s):
                    raise
        return write()

    def _seal(self, request: "_Save", staging: Path) -> tuple[Path, int]:
        files = {}
        for posted in self._collect(request.number):
            if "error" in posted:
                raise CheckpointError(posted["error"])
            files[posted.pop("name")] = posted
        for name, expected in files.items():
            _await_visible(staging / name, expected["bytes"])
        state = json.dumps(request.state, indent=1)
        files[layout.STATE] = self._repeated(lambda: layout.write_synced(staging / layout.STATE, state))
        layout.write_manifest(staging, request.step, files)
        folder = layout.step_folder(self.root, request.step)
        layout.publish(staging, folder)
        return folder, sum(file["bytes"] for file in files.values())

    def _collect(self, number: int) -> list[dict[str, Any]]:
        """Every rank's post of this save. Raises CheckpointError after the timeout."""
        posts, started = [], time.monotonic()
        for rank in range(self._world.size):
            key = self._key(number, rank)
            while not self._store.check([key]):
                now = time.monotonic()
                closing = self._closing_at is not None and now - self._closing_at > _GRACE_S
                if closing or now - started > self._timeout_s:
                    raise CheckpointError(f"rank {rank} did not write its file within {now - started:.0f} s.")
                time.sleep(0.005)
            posts.append(json.loads(self._store.get(key)))
            self._store.delete_key(key)
        return posts

    def _tidy(self, request: "_Save", size: int) -> None:
        """Delete surplus commits and the remains of failed saves; report a nearly full disk."""
        protected = self._mirror.unfinished() if self._mirror else set()
        steps = [commit.step for commit in layout.commits(self.root)]
        for step in self._retention.surplus(steps, newest=request.step, losses=request.losses):
            if step not in protected:
                layout.remove(self.root, step)
        for leftover in self.root.glob(f"step-*{STAGING}*"):
            # another rank may already be writing the next step
            if (layout.step_of(leftover.name.partition(STAGING)[0]) or 0) < request.step:
                shutil.rmtree(leftover, ignore_errors=True)
        free = shutil.disk_usage(self.root).free
        if free < 2 * size and not self._reported_full:
            self._reported_full = True
            note = f"{self.root}: disk nearly full; {_gigabytes(free)} free, a checkpoint takes {_gigabytes(size)}"
            self._add_event(
                SaveEvent("disk_nearly_full", request.step, {"free_bytes": free, "needed_bytes": size}, note)
            )

    def _agree_on_attempt(self) -> None:
        """Get a name for this attempt from rank 0, which keeps out files that a killed attempt may still write.

        Rank 0 publishes the name once the folder is clean, so no rank writes before that.
        """
        key = "checkpoint/attempt"
        if self._world.is_main:
            try:
                self._begin_attempt()
            except OSError as error:
                problem = (
                    f"{self.root}: cannot be written ({error.strerror}). Nothing was changed: fix that and run the "
                    "same command again."
                )
                self._store.set(key, json.dumps({"error": problem}))
                raise CheckpointError(problem) from None
            self._store.set(key, json.dumps({"attempt": self._attempt}))
            return
        self._store.wait([key], timedelta(seconds=self._timeout_s))
        answer = json.loads(self._store.get(key))
        if "error" in answer:
            raise CheckpointError(answer["error"])
        self._attempt = answer["attempt"]
        if not _appears(self._probe()):
            raise CheckpointError(
                f"{self.root.absolute()}: rank {self._world.rank} does not see what rank 0 writes there. A run on "
                "several nodes needs its output_dir on a file system that all of them share."
            )

    def _begin_attempt(self) -> None:
        """Raises OSError."""
        self.root.mkdir(parents=True, exist_ok=True)
        for leftover in self.root.glob(f"step-*{STAGING}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        layout.finish_removals(self.root)
        for probe in self.root.glob(".attempt-*"):
            probe.unlink(missing_ok=True)
        self._attempt = secrets.token_hex(4)
        self._probe().touch()

    @property
    def _store(self) -> Any:
        """A connection of the thread that asks: a long wait of another one holds up nothing."""
        return control_store()

    def _probe(self) -> Path:
        return self.root / f".attempt-{self._attempt}"

    def _newest(self) -> str:
        with contextlib.suppress(StorageError):
            found = layout.commits(self.root, wait_s=1.0)
            return str(found[-1].folder) if found else "the beginning"
        return "the newest commit"

    def _key(self, number: int, rank: int) -> str:
        return f"checkpoint/{number}/{rank}"

    def _post(self, number: int, content: dict[str, Any]) -> None:
        # the store is gone, so rank 0 and the run have ended
        with contextlib.suppress(torch.distributed.DistError, RuntimeError):
            self._store.set(self._key(number, self._world.rank), json.dumps(content))

    def _add_event(self, event: SaveEvent) -> None:
        with self._lock:
            self._events.append(event)


@dataclass(frozen=True)
class _Save:
    number: int
    step: int
    state: dict[str, Any]
    losses: dict[int, float]
    started: float


def _await_visible(path: Path, size: int) -> None:
    if not _appears(path, lambda: path.stat().st_size == size):
        raise CheckpointError(f"{path}: written by another rank, but not visible to rank 0 with its {size} bytes.")


def _appears(path: Path, whole: Callable[[], bool] = lambda: True) -> bool:
    """True once the file exists; a shared file system may show other nodes' files late."""
    deadline = time.monotonic() + _VISIBLE_S
    while True:
        with contextlib.suppress(FileNotFoundError):
            path.stat()
            if whole():
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.3g} GB"
