"""Copies of commits in an object store or on another disk, made in the background and read if the local ones are lost.

Rank 0 copies sealed commits file by file, the manifest last, so that a reader of the store never sees half a commit.
A failed copy is reported and loses nothing: the local commit remains, and the next commit is copied as usual.
"""

import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import xxhash

from ft_dist.checkpoint.commit import format as layout
from ft_dist.checkpoint.commit.lease import Lease, remote_steps
from ft_dist.checkpoint.commit.retention import Retention
from ft_dist.checkpoint.commit.save_event import SaveEvent
from ft_dist.errors import CheckpointError, StorageError, UserError
from ft_dist.storage import Storage

MIRROR_WAIT_S = 600.0
"""How long to retry one request to the store"""


class Mirror:
    """Copies commits to `storage`, whose `lease` it holds. During a copy, only the newest commit and the milestones
    wait."""

    def __init__(self, storage: Storage, retention: Retention, lease: Lease) -> None:
        self.storage = storage
        self._lease = lease
        self._retention = retention
        self._pending: list[tuple[layout.Commit, dict[int, float]]] = []
        self._current: int | None = None
        self._events: list[SaveEvent] = []
        self._changed = threading.Condition()
        self._closing = False
        self._thread: threading.Thread | None = None

    def offer(self, commit: layout.Commit, *, losses: Mapping[int, float]) -> None:
        """Queue `commit` for copying. `losses` (held-out, by step) decide which commits the store keeps."""
        with self._changed:
            milestones = [entry for entry in self._pending if self._retention.is_milestone(entry[0].step)]
            self._pending = [*milestones, (commit, dict(losses))]
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
                self._thread.start()
            self._changed.notify()

    def unfinished(self) -> set[int]:
        """Steps whose local files are still to be copied."""
        with self._changed:
            waiting = {commit.step for commit, _ in self._pending}
            return waiting | ({self._current} if self._current is not None else set())

    def new_events(self) -> list[SaveEvent]:
        with self._changed:
            found, self._events = self._events, []
        return found

    def close(self) -> None:
        """Wait until every queued commit is copied or has failed."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread:
            self._thread.join()
        self._lease.release()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._current = None
                self._changed.wait_for(lambda: self._pending or self._closing)
                if not self._pending:
                    return
                commit, losses = self._pending.pop(0)
                self._current = commit.step
            event = self._copy(commit, losses)
            with self._changed:
                self._events.append(event)

    def _copy(self, commit: layout.Commit, losses: Mapping[int, float]) -> SaveEvent:
        started = time.monotonic()
        try:
            if self._lease.lost:
                raise StorageError(f"{self._lease.lost}.")
            if not self._lease.held:  # the store did not answer when the run started
                self._lease.take(say=lambda line: None)
            upload(commit, self.storage)
            for step in self._retention.surplus(remote_steps(self.storage), newest=commit.step, losses=losses):
                remove_remote(self.storage, step)
        except (OSError, UserError) as error:
            note = (
                f"step {commit.step} was not copied to {self.storage.url}: {error} "
                f"The local commit in {commit.folder} is intact."
            )
            return SaveEvent("mirror_failed", commit.step, {"reason": str(error)}, note)
        fields = {"url": self.storage.url, "seconds": round(time.monotonic() - started, 3)}
        return SaveEvent("mirrored", commit.step, fields)


def upload(commit: layout.Commit, storage: Storage) -> None:
    """Copy a local commit; removes the manifest first and writes it last. Raises StorageError, OSError."""
    folder = layout.step_name(commit.step)
    storage.delete(f"{folder}/{layout.MANIFEST}")
    for name in commit.manifest()["files"]:
        storage.write(f"{folder}/{name}", commit.folder / name)
    storage.write(f"{folder}/{layout.MANIFEST}", (commit.folder / layout.MANIFEST).read_bytes())


def remove_remote(storage: Storage, step: int) -> None:
    folder = layout.step_name(step)
    if storage.local:
        layout.remove(storage.local, step)
        return
    storage.delete(f"{folder}/{layout.MANIFEST}")
    for name in storage.list(folder):
        storage.delete(name)


def fetch(storage: Storage, step: int, root: Path) -> layout.Commit:
    """Download a commit from a store to `root`, verifying every byte; sets aside a damaged one of the same step.

    Raises CheckpointError naming the missing or damaged object, StorageError if the store does not answer.
    """
    folder = layout.step_folder(root, step)
    name = folder.name
    partial = root / f"{name}.fetching"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        text = storage.read_bytes(f"{name}/{layout.MANIFEST}")
        manifest = layout.parse_manifest(text, storage.url_of(f"{name}/{layout.MANIFEST}"))
        if manifest["step"] != step:
            raise CheckpointError(f"{storage.url_of(name)}: its manifest belongs to step {manifest['step']}.")
        for file, expected in manifest["files"].items():
            digest = xxhash.xxh3_128()
            storage.fetch(f"{name}/{file}", partial / file, digest=digest)
            found = {"bytes": (partial / file).stat().st_size, "xxh3": digest.hexdigest()}
            layout.check_fingerprint(storage.url_of(f"{name}/{file}"), found, expected)
        layout.write_synced(partial / layout.MANIFEST, text.decode())
        if folder.exists():
            layout.set_aside(folder)
        layout.publish(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return layout.Commit(folder, step)
