"""Who may write to `checkpoint.path`: one run, from one place at a time.

`run.json` in the store names the run and, while it runs, its holder, who renews it every RENEW_S. Object stores have no
locks, so a newcomer watches: a record that does not change for LEASE_S was left by a process that is gone. It compares
contents over time, never the clocks of two machines.
"""

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ft_dist.checkpoint.commit import format as layout
from ft_dist.errors import ConfigError, MissingFileError, StorageError
from ft_dist.outside import Document, parse_document, parse_object
from ft_dist.storage import Storage

RECORD = "run.json"
RENEW_S = 10.0
LEASE_S = 40.0
WATCH_S = 2.0
SETTLE_S = 1.0
"""Of two that find the store free at once, the one whose record remains has it"""

Say = Callable[[str], None]


class Holder(Document):
    token: str
    host: str
    pid: int
    folder: str
    """Absolute path of its output_dir"""


class MirrorRecord(Document):
    """Content of RECORD."""

    run_id: str
    output_dir: str
    """As in the config"""
    renewed: int = 0
    holder: Holder | None = None


class Lease:
    """Of one store, for one run. `run_id` is None until `take` for a folder in which no run has started."""

    def __init__(self, storage: Storage, *, run_id: str | None, output_dir: str, hasty: Storage | None = None) -> None:
        """`hasty`: the same store with a short wait, to renew and release, which is worth nothing late."""
        self.run_id = run_id
        self.lost = ""
        """Why the store may no longer be written to"""
        self._storage = storage
        self._hasty = hasty or storage
        self._output_dir = output_dir
        folder = str(Path(output_dir).absolute())
        self._holder = Holder(token=secrets.token_hex(8), host=socket.gethostname(), pid=os.getpid(), folder=folder)
        self._renewed = 0
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def held(self) -> bool:
        return self._thread is not None and not self.lost

    def check(self) -> MirrorRecord | None:
        """What the store holds. Writes nothing. Raises ConfigError if that is another run, StorageError."""
        found = read_record(self._storage) or self._of_older_version()
        if found is not None:
            self._check_run(found)
        return found

    def take(self, *, say: Say) -> None:
        """Wait for a holder that is gone or ends, then renew the lease in the background until `release`.

        Raises ConfigError if the store has the copies of another run or is in use, StorageError.
        """
        found = self.check()
        self.run_id = self.run_id or (found.run_id if found else new_run_id())
        known = found is not None and found.holder is not None and self._is_my_predecessor(found.holder)
        if found is not None and found.holder is not None and not known:
            self._await_end(found, say)
        self._write(self._holder)
        if not known:
            time.sleep(SETTLE_S)
            if not self._is_mine():
                raise _in_use(self._storage, read_record(self._storage))
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Let the next start have the store at once."""
        if self._thread is None:
            return
        self._ending.set()
        self._thread.join(LEASE_S)
        with suppress(StorageError):
            if not self.lost and self._is_mine():
                self._write(None)

    def _check_run(self, found: MirrorRecord) -> None:
        """A folder without a run of its own continues the run of an output_dir of the same name, whose disk is lost."""
        same_place = self._is_here(found.output_dir)
        if self.run_id == found.run_id or (self.run_id is None and same_place):
            return
        raise ConfigError(
            f"checkpoint.path={self._storage.url}: holds the run of output_dir={found.output_dir}, not the one in "
            f"output_dir={self._output_dir}. Choose another checkpoint.path"
            + ("." if same_place else f", or continue that run with output_dir={found.output_dir}.")
        )

    def _of_older_version(self) -> MirrorRecord | None:
        """Copies without a record are of the run in their newest commit's config."""
        steps = remote_steps(self._storage)
        if not steps:
            return None
        name = f"{layout.step_name(steps[-1])}/{layout.STATE}"
        where = self._storage.url_of(name)
        state = parse_object(self._storage.read_bytes(name), where=where, error=StorageError)
        config = state.get("config")
        place = config.get("output_dir") if isinstance(config, dict) else None
        place = place if isinstance(place, str) else self._output_dir
        run_id = state.get("run_id") or (self.run_id if self._is_here(place) else None) or new_run_id()
        if not isinstance(run_id, str):
            raise StorageError(f"{where}: run_id is not a string.")
        return MirrorRecord(run_id=run_id, output_dir=place)

    def _is_here(self, output_dir: str) -> bool:
        return Path(output_dir).absolute() == Path(self._output_dir).absolute()

    def _renew(self) -> None:
        while not self._ending.wait(RENEW_S):
            try:
                if not self._is_mine():
                    self.lost = "another process has taken over the copies of this run"
                    return
                self._renewed += 1
                self._write(self._holder)
            except StorageError:  # the next copy reports it
                continue

    def _is_mine(self) -> bool:
        found = read_record(self._hasty)
        return found is not None and found.holder is not None and found.holder.token == self._holder.token

    def _is_my_predecessor(self, holder: Holder) -> bool:
        """Of this very folder, whose lock we hold: it is gone."""
        return (holder.host, holder.folder) == (self._holder.host, self._holder.folder)

    def _await_end(self, found: MirrorRecord, say: Say) -> None:
        say(f"waiting up to {2 * LEASE_S:.0f} s for the holder of {self._storage.url} ({_shown(found)}), if it is gone")
        started = changed = time.monotonic()
        while time.monotonic() - changed < LEASE_S:
            if time.monotonic() - started > 2 * LEASE_S:
                raise _in_use(self._storage, found)
            time.sleep(WATCH_S)
            now = read_record(self._storage)
            if now is None or now.holder is None:
                return
            if now != found:
                found, changed = now, time.monotonic()

    def _write(self, holder: Holder | None) -> None:
        assert self.run_id
        record = MirrorRecord(run_id=self.run_id, output_dir=self._output_dir, renewed=self._renewed, holder=holder)
        self._hasty.write(RECORD, record.model_dump_json().encode())


def new_run_id() -> str:
    return secrets.token_hex(8)


def remote_steps(storage: Storage) -> list[int]:
    """Steps of the commits in a store, ascending."""
    found = []
    for name in storage.list():
        folder, _, file = name.rpartition("/")
        step = layout.step_of(folder)
        if step is not None and file == layout.MANIFEST:
            found.append(step)
    return sorted(found)


def read_record(storage: Storage) -> MirrorRecord | None:
    """None if the store holds no run, or copies that an older version made. Raises StorageError."""
    try:
        text = storage.read_bytes(RECORD)
    except MissingFileError:
        return None
    return parse_document(text, MirrorRecord, where=storage.url_of(RECORD), error=StorageError)


def _in_use(storage: Storage, record: MirrorRecord | None) -> ConfigError:
    return ConfigError(
        f"checkpoint.path={storage.url}: is in use by {_shown(record)}. Wait for it, or choose another checkpoint.path."
    )


def _shown(record: MirrorRecord | None) -> str:
    if record is None or record.holder is None:
        return "another run"
    return f"output_dir={record.output_dir} on {record.holder.host}, pid {record.holder.pid}"
