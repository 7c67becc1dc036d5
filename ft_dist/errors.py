"""Exit codes, on which scripts rely, and the errors that lead to them.

A message states the value, the rule with its numbers, and the fix, in one line.
"""

EXIT_FINISHED = 0
EXIT_FAILED = 1
EXIT_USER = 2
EXIT_PREEMPTED = 75
EXIT_HUNG = 76
"""A rank made no progress for engine.hang_timeout_s: restart the run, which resumes from the last commit"""

NEW_RUN = "start a new run with another output_dir (and another checkpoint.path and checkpoint.resume, if set)"
"""The way out if a checkpoint cannot be resumed: a mirror or a named checkpoint would be found again"""


LONGEST_MESSAGE = 1900
"""Characters; longer messages repeat what they were given, and lose their middle"""


class UserError(Exception):
    """Something the user can fix: reported in one line without a traceback, exit 2.

    A message may repeat values from any file, so line breaks and other unprintable characters become escapes.
    """

    def __init__(self, message: str) -> None:
        shown = "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in message)
        if len(shown) > LONGEST_MESSAGE:
            shown = f"{shown[: LONGEST_MESSAGE * 2 // 3]} ... {shown[-LONGEST_MESSAGE // 3 + 5 :]}"
        super().__init__(shown)


class ConfigError(UserError):
    """A config value, key or combination is invalid."""


class MemoryPlanError(ConfigError):
    """A run that will not fit in memory, according to its plan. `short` states only the two figures."""

    def __init__(self, message: str, *, short: str) -> None:
        super().__init__(message)
        self.short = short


class DataError(UserError):
    """A data file is missing, malformed or empty; names the file and line."""


class ModelError(UserError):
    """A model folder, tokenizer or target module is missing or unsuitable."""


class CheckpointError(UserError):
    """A checkpoint is incomplete, damaged or from another run."""


class CheckpointVersionError(CheckpointError):
    """A checkpoint of another format version. It is not damaged, so an older one must not replace it silently."""


class StorageError(UserError):
    """A folder or object store cannot be read or written; names the URL."""


class MissingFileError(StorageError):
    """A file does not exist in its storage."""


class PreflightError(UserError):
    """A node or the network between nodes is unfit for the run; names the node, the value and the fix."""


class TrainingError(Exception):
    """Training failed (for example consecutive non-finite losses): exit 1."""


class Preempted(Exception):  # noqa: N818 - not an error: the run is committed and can be requeued
    """A signal arrived and the run is committed: exit 75."""


def first_line(error: BaseException) -> str:
    """The first line of a library's error message, at most 200 characters; its type if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def counted(count: int, noun: str) -> str:
    """`1 step`, `2 steps`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
