"""Errors that a user can cause, each with the exit code that scripts rely on.

A message names the value, the rule with its numbers, and the fix, in one line.
"""

EXIT_FINISHED = 0
EXIT_FAILED = 1
EXIT_USER = 2
EXIT_PREEMPTED = 75
EXIT_HUNG = 76
"""A rank made no progress for engine.hang_timeout_s: start it again, it goes on from the last commit"""


class UserError(Exception):
    """Something the user can mend: told in one line, no traceback, exit 2."""


class ConfigError(UserError):
    """A config value, key or combination that cannot work."""


class MemoryPlanError(ConfigError):
    """A run that is planned not to fit. `short` has only the two figures."""

    def __init__(self, message: str, *, short: str) -> None:
        super().__init__(message)
        self.short = short


class DataError(UserError):
    """A data file that is missing, malformed or empty; names file and line."""


class ModelError(UserError):
    """A model folder, tokenizer or target module that does not fit."""


class CheckpointError(UserError):
    """A checkpoint that is incomplete, damaged or belongs to another run."""


class StorageError(UserError):
    """A folder or object store that cannot be read or written; names the URL."""


class MissingFileError(StorageError):
    """A file that is not in its storage."""


class PreflightError(UserError):
    """A node, or the way between nodes, that is not fit for the run; names node, value and fix."""


class TrainingError(Exception):
    """The run itself went wrong (for example non-finite losses in a row): exit 1."""


class Preempted(Exception):  # noqa: N818 - not an error: the run is safe and asks to be requeued
    """A signal arrived and the state is committed: exit 75."""
