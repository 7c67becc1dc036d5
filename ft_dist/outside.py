"""What comes from outside this process: JSON that we read back, file names inside it, and chat templates.

Files may be torn by a full disk, written by another version, or made by somebody who wants to harm the reader. So
every JSON document has a schema, and every name of a file is checked before it is joined to a folder. Both fail with
one line that names the place, the value, and the rule. A chat template is a program, so it gets a limited time.
"""

import ctypes
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from ft_dist.errors import UserError

MAX_PART_BYTES = 255
"""Longest name of one file or folder on Linux file systems"""


class Document(BaseModel):
    """Base of the schemas. Keys of newer versions are ignored; values keep their JSON types; numbers are finite."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, allow_inf_nan=False)


Schema = TypeVar("Schema", bound=Document)


def parse_json(text: bytes | str, *, where: object, error: type[UserError]) -> Any:
    """Raises `error` for anything but one JSON value: cut UTF-8, too deep nesting, integers of thousands of digits."""
    try:
        return json.loads(text)
    except RecursionError:
        raise error(f"{where}: nested too deeply to be read as JSON.") from None
    except ValueError as problem:  # invalid JSON, invalid UTF-8, an integer beyond Python's limit
        raise error(f"{where}: not readable as JSON ({one_line(problem)}).") from None


def parse_object(text: bytes | str, *, where: object, error: type[UserError]) -> dict[str, Any]:
    """Raises `error` unless the text is one JSON object."""
    tree = parse_json(text, where=where, error=error)
    if not isinstance(tree, dict):
        raise error(f"{where}: contains {type(tree).__name__}, not a JSON object.")
    return tree


def parse_document(text: bytes | str, schema: type[Schema], *, where: object, error: type[UserError]) -> Schema:
    """Raises `error`, which names the first key that is missing or wrong."""
    return validated(parse_object(text, where=where, error=error), schema, where=where, error=error)


def validated(tree: dict[str, Any], schema: type[Schema], *, where: object, error: type[UserError]) -> Schema:
    """Raises `error`, which names the first key that is missing or wrong."""
    try:
        # by JSON's rules, in which a key that stands for a number is a string
        return schema.model_validate_json(json.dumps(tree))
    except ValidationError as problem:
        first = problem.errors(include_url=False)[0]
        key = one_line(".".join(str(part) for part in first["loc"]))
        raise error(f"{where}: {key or 'its content'}: {one_line(first['msg'])}.") from None
    except RecursionError:
        raise error(f"{where}: nested too deeply to be read as JSON.") from None


def check_name(name: object, *, where: object, error: type[UserError]) -> str:
    """The relative path `name`, as `a/b`, if it stays below the folder that it is joined to.

    Raises `error` for an absolute path, `..`, an empty part, control characters or a name too long for a file system.
    Symbolic links inside the folder are the business of whoever may write there.
    """
    parts = name.split("/") if isinstance(name, str) else []
    fits = all(part not in ("", ".", "..") and len(part.encode(errors="replace")) <= MAX_PART_BYTES for part in parts)
    if not isinstance(name, str) or not parts or not fits or not name.isprintable() or "\\" in name:
        raise error(
            f"{where}: names the file {_shown(name)}, which is not a plain path below its own folder. Do not use it."
        )
    return name


def expand_home(path: str | Path, *, error: type[UserError]) -> Path:
    """The path with `~` and `~user` expanded. Raises `error` if this machine has no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        where = _shown(str(path))
        raise error(f"{where}: names the home folder of a user whom this machine does not have. Correct it.") from None


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def one_line(problem: object, *, most: int = 200) -> str:
    """The text of an error of a library, which may repeat what it has read: one line of printable characters."""
    text = "".join(sign if sign.isprintable() else " " for sign in str(problem))
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 3] + "..."


RENDER_SECONDS = 10.0
"""Limit for one render of a chat template: thousands of times what the longest conversation takes"""
DEADLINE_POLL_SECONDS = 0.5

Result = TypeVar("Result")


class TooLongError(BaseException):
    """A call did not end in time. Not an Exception: nothing inside the call may catch it."""


class Deadline:
    """Ends calls that take longer than `seconds`, on any thread.

    A signal would reach the main thread only, and a timer per call would cost more than a render. So one thread per
    process looks at the calls in progress, and raises an exception inside one that is late. It arrives at the next
    Python instruction: a single call into C code can take longer.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._ends: dict[int, float] = {}
        """Thread -> when its call is late"""
        self._watcher: threading.Thread | None = None

    def run(self, call: Callable[[], Result]) -> Result:
        """Raises TooLongError if the call does not end in time. A thread has one call at a time."""
        if self._watcher is None or not self._watcher.is_alive():  # a fork has no threads
            self._start()
        thread = threading.get_ident()
        self._ends[thread] = time.monotonic() + self._seconds
        try:
            try:
                return call()
            finally:
                with self._lock:  # after this the watcher does not raise any more
                    late = self._ends.pop(thread, None) is None
                if late:
                    _await_exception()
        except TooLongError:
            raise TooLongError from None

    def _start(self) -> None:
        with self._lock:
            if self._watcher is None or not self._watcher.is_alive():
                self._watcher = threading.Thread(target=self._watch, name="deadline", daemon=True)
                self._watcher.start()

    def _watch(self) -> None:
        while True:
            time.sleep(DEADLINE_POLL_SECONDS)
            now = time.monotonic()
            with self._lock:
                for thread in [thread for thread, end in list(self._ends.items()) if end < now]:
                    del self._ends[thread]
                    raised = ctypes.py_object(TooLongError)
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), raised)


def _await_exception() -> None:
    """Let an exception arrive that was raised from outside, if it is still on its way."""
    for _ in range(10):
        time.sleep(0.001)


RENDERS = Deadline(RENDER_SECONDS)
