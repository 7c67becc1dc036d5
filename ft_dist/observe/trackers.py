"""Sends metrics to wandb and TensorBoard if the config asks for it. Rank 0 only.

Each tracker runs on a thread of its own, so that a service that hangs, refuses or fails can neither delay nor end a
run. The files of the run folder hold everything that trackers get.
"""

import http.client
import re
import secrets
import ssl
import threading
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any, Protocol

from ft_dist.config.schema import RunConfig
from ft_dist.errors import counted, first_line
from ft_dist.observe.patient import replace
from ft_dist.run_folder import RunFolder

MOST_WAITING = 10_000
"""Records; what waits beyond this is dropped, the oldest first"""
RETRY_S = 10.0
ANSWER_S = 10.0
WANDB_INIT_S = 60.0
RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")

Note = Callable[[str], None]


class Tracker(Protocol):
    """Its methods may raise anything."""

    def log(self, record: dict[str, Any], step: int) -> None: ...

    def close(self) -> None: ...


class WandbTracker:
    """One wandb run per output_dir: its id is stored there, so that a resumed run continues it.

    If wandb cannot be reached at the start, or has no key, the metrics are kept for `wandb sync`.
    """

    def __init__(self, config: RunConfig, run_id: str, note: Note) -> None:
        try:
            if config.observe.wandb == "online":
                _check_reachable()
            self.run = self._start(config, run_id, config.observe.wandb)
        except Exception as error:
            if config.observe.wandb != "online":
                raise
            self.run = self._start(config, run_id, "offline")
            note(
                f"wandb cannot be used ({first_line(error)}). Its metrics are kept in the run folder; to upload them: "
                f"wandb login; wandb sync {config.run_dir / 'wandb'}/offline-run-*-{run_id}"
            )

    def _start(self, config: RunConfig, run_id: str, mode: str) -> Any:
        import wandb

        return wandb.init(
            project=config.observe.wandb_project,
            name=config.observe.run_name or config.run_dir.name,
            id=run_id,
            resume="allow",
            mode=mode,
            dir=str(config.run_dir),
            config=config.model_dump(mode="json"),
            # a question for the key would wait for the keyboard
            settings=wandb.Settings(silent=True, init_timeout=WANDB_INIT_S, login_timeout=1),
        )

    def log(self, record: dict[str, Any], step: int) -> None:
        self.run.log({key: value for key, value in record.items() if key != "step"}, step=step)

    def close(self) -> None:
        self.run.finish()


class TensorBoardTracker:
    def __init__(self, config: RunConfig, *, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        _silence_tensorboard()
        self.writer = SummaryWriter(str(RunFolder(config.run_dir).tensorboard), purge_step=first_step)

    def log(self, record: dict[str, Any], step: int) -> None:
        for key, value in record.items():
            if key != "step" and isinstance(value, int | float):
                self.writer.add_scalar(key, value, step)
        self.writer.flush()  # or an error would take records with it that count as sent

    def close(self) -> None:
        self.writer.close()


@cache
def _silence_tensorboard() -> None:
    """Its writer thread passes its error on and raises it again, for Python to print: keep the traceback out of the
    console, where `Feed` says the same in a line."""
    others = threading.excepthook

    def hook(raised: threading.ExceptHookArgs) -> None:
        if not type(raised.thread).__module__.startswith("tensorboard."):
            others(raised)

    threading.excepthook = hook


class Feed:
    """Feeds one tracker from its own thread; after an error, opens it again after RETRY_S."""

    def __init__(self, name: str, open_tracker: Callable[[int], Tracker], *, note: Note, advice: str = "") -> None:
        """`open_tracker` gets the step of the first record it will be given."""
        self._name, self._open, self._note, self._advice = name, open_tracker, note, advice
        self._waiting: deque[tuple[dict[str, Any], int]] = deque()
        self._dropped = 0
        self._noted = self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def log(self, record: dict[str, Any], step: int) -> None:
        with self._changed:
            self._waiting.append((record, step))
            if len(self._waiting) > MOST_WAITING:
                self._waiting.popleft()
                self._dropped += 1
            self._changed.notify()

    def close(self, *, wait_s: float) -> None:
        """Wait until everything is sent, but not longer than `wait_s`; say what is not."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(wait_s)
        missing = len(self._waiting) + self._dropped
        if missing:
            self._note(f"{self._name}: {counted(missing, 'record')} not sent. {self._advice}".rstrip())
        elif self._thread.is_alive():
            self._note(f"{self._name}: not finished within {wait_s:.0f} s. {self._advice}".rstrip())

    def _run(self) -> None:
        tracker: Tracker | None = None
        while self._has_more():
            record, step = self._waiting[0]
            try:
                tracker = tracker or self._open(step)
                tracker.log(record, step)
                with self._changed:
                    if self._waiting and self._waiting[0][0] is record:
                        self._waiting.popleft()
            except Exception as error:  # any: it comes from a library
                self._failed(error)
                _close_quietly(tracker)
                tracker = None
                if self._closing:
                    return
        if tracker:
            try:
                tracker.close()
            except Exception as error:
                self._failed(error)

    def _has_more(self) -> bool:
        """Wait for a record; False once there are none and the run ends."""
        with self._changed:
            while not self._waiting and not self._closing:
                self._changed.wait()
            return bool(self._waiting)

    def _failed(self, error: Exception) -> None:
        if not self._noted:
            self._noted = True
            self._note(f"{self._name} fails ({first_line(error)}). Training continues; it is tried again later")
        with self._changed:
            self._changed.wait_for(lambda: self._closing, RETRY_S)


def open_trackers(config: RunConfig, *, resumed_step: int, note: Note) -> list[Feed]:
    """`note` prints a line; it is called from other threads too."""
    feeds = []
    if config.observe.wandb != "off":
        run_id = wandb_run_id(config) or secrets.token_hex(4)
        keep_wandb_run_id(config, run_id, note=note)
        advice = f"To upload what its folder holds: wandb sync {config.run_dir / 'wandb'}/*run-*-{run_id}"
        feeds.append(Feed("wandb", lambda _: WandbTracker(config, run_id, note), note=note, advice=advice))
    if config.observe.tensorboard:
        feeds.append(Feed("tensorboard", lambda step: TensorBoardTracker(config, first_step=max(step, 1)), note=note))
    return feeds


def wandb_run_id(config: RunConfig) -> str | None:
    """The id of this run at wandb, if it has one."""
    with suppress(OSError):
        text = RunFolder(config.run_dir).wandb_run_id.read_bytes()[:100].decode(errors="replace").strip()
        return text if RUN_ID.fullmatch(text) else None
    return None


def keep_wandb_run_id(config: RunConfig, run_id: str, *, note: Note) -> None:
    path = RunFolder(config.run_dir).wandb_run_id
    try:
        config.run_dir.mkdir(parents=True, exist_ok=True)
        replace(path, run_id.encode())
    except OSError as error:
        note(f"{path}: cannot be written ({error.strerror}), so a restart begins another run at wandb")


def _check_reachable() -> None:
    """Raises OSError if the server does not answer in ANSWER_S. wandb itself tries for minutes, and then blocks the id
    of the run."""
    import wandb

    settings = wandb.setup().settings  # with what the environment says
    url = settings.base_url
    if settings.http_proxy or settings.https_proxy:  # wandb's own
        return
    try:
        with urllib.request.urlopen(url, timeout=ANSWER_S):  # noqa: S310 - wandb's own address
            pass
    except urllib.error.HTTPError:
        pass  # an answer
    except urllib.error.URLError as error:
        if not isinstance(error.reason, ssl.SSLError):  # an answer too: wandb has its own settings for certificates
            raise OSError(f"{url} does not answer: {error.reason}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise OSError(f"{url} does not answer: {getattr(error, 'reason', error)}") from None


def _close_quietly(tracker: Tracker | None) -> None:
    if tracker:
        with suppress(Exception):
            tracker.close()
