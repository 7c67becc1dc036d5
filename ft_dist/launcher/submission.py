"""A complete submission: the files with their contents, and the command. `--dry-run` only prints it."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ft_dist.errors import UserError
from ft_dist.launcher.request import RequestedRun

COMMAND_TIMEOUT_S = 120


@dataclass(frozen=True)
class Submission:
    """`script` is the one of `files` that the command submits; `logs` the console of each run, None if this machine
    cannot see it; `next_steps` what the user must still do."""

    target: str
    runs: Sequence[RequestedRun]
    script: Path
    files: dict[Path, str]
    command: Sequence[str]
    logs: Sequence[Path | None]
    next_steps: str = ""

    def write(self) -> None:
        """Write the files, each atomically."""
        for path, content in self.files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{path.name}.partial")
            partial.write_text(content, encoding="utf-8")
            if content.startswith("#!"):
                partial.chmod(0o755)
            partial.replace(path)

    def text(self) -> str:
        """The script alone, so that it can be piped to another program; `as_dict` has all files."""
        return self.files[self.script]

    def as_dict(self) -> dict[str, object]:
        return {
            "target": self.target,
            "script": str(self.script),
            "command": list(self.command),
            "files": {str(path): content for path, content in self.files.items()},
        }


def call(command: Sequence[str], *, check: bool = True) -> str:
    """Output of a platform's own program. Raises UserError if it is missing or, with `check`, fails."""
    program = shutil.which(command[0])
    if program is None:
        raise UserError(
            f"{command[0]}: program not found. Install it, or use --dry-run and submit the script elsewhere."
        )
    try:
        done = subprocess.run(
            [program, *command[1:]],
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            env=os.environ | {"LC_ALL": "C", "SLURM_TIME_FORMAT": "standard"},
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]}: no answer within {COMMAND_TIMEOUT_S} s. Is the cluster up?") from None
    if check and done.returncode:
        output = " ".join((done.stderr or done.stdout).split())
        raise UserError(f"{command[0]} exited with {done.returncode}: {output[-500:]}")
    return done.stdout.strip()
