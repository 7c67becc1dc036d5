"""The secret of a run: whoever knows it is a member of the run, and may start, stop and end it.

On one machine, the agent makes one and passes it to its workers in the environment. On several nodes, FT_DIST_SECRET
holds it; without that variable, the head makes a new one at every start and writes it to `launch/secret` in
`output_dir`, which all nodes share anyway. It never appears in a command line, a log, a config or a record.
"""

import contextlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from ft_dist.errors import UserError

VARIABLE = "FT_DIST_SECRET"
LEAST_CHARACTERS = 32
ADVICE = f"run `export {VARIABLE}=$(openssl rand -hex 32)` once, and give every node the same value"


def new_secret() -> str:
    return secrets.token_hex(32)


def secret_of(environment: Mapping[str, str]) -> str | None:
    """FT_DIST_SECRET, if set. Raises UserError if it could be guessed; never shows it."""
    secret = environment.get(VARIABLE, "").strip()
    if secret and len(secret) < LEAST_CHARACTERS:
        raise UserError(
            f"{VARIABLE} has {len(secret)} characters; at least {LEAST_CHARACTERS} are needed, so that nobody can "
            f"guess it: {ADVICE}."
        )
    return secret or None


class RunSecret:
    """How the agents of several nodes get the secret of their run."""

    def __init__(self, path: Path) -> None:
        """`path`: the file below `output_dir`. Raises UserError if FT_DIST_SECRET is too short."""
        self._path = path.absolute()
        self._given = secret_of(os.environ)
        self.value = self._given or ""
        """The one that was created or read last"""

    @property
    def source(self) -> str:
        return VARIABLE if self._given else str(self._path)

    def create(self) -> str:
        """For the head. Raises UserError if the file cannot be written."""
        if self._given:
            return self._given
        secret, path = new_secret(), self._path
        partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # the file must never be readable by others, not even before it has its name
            with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secret)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written ({error.strerror}). Make output_dir writable, or {ADVICE}."
            ) from None
        self.value = secret
        return secret

    def read(self) -> str | None:
        """For the others, at each attempt: a head that has just started may have written a new one. None if not yet."""
        if self._given:
            return self._given
        try:
            self.value = self._path.read_text(encoding="ascii")
        except (OSError, UnicodeDecodeError):
            return None
        return self.value or None

    def remove(self) -> None:
        """For the head at its end: no secret outlives its run, and a run that has not begun leaves no folder."""
        if self._given:
            return
        own = self.value
        if self.read() == own:
            self._path.unlink(missing_ok=True)
        for folder in self._path.parents[:2]:
            with contextlib.suppress(OSError):
                folder.rmdir()  # only if it is empty
