"""The folder of one commit, written completely or not at all. Specification: docs/reference/checkpoint-format.md.

    checkpoints/step-00000100/
        rank-00000.safetensors    this rank's fragments: KIND/PARAMETER@START, flat
        state.json                step, data position, counters, shapes, the config
        manifest.json             size and xxh3-128 checksum of every file, and its own checksum; written last

KIND is `master` or the name of an optimizer state such as `exp_avg`; START counts elements of the flattened parameter.
A save is written to a staging folder, sealed by its manifest and only then renamed. So a folder `step-N` with a
manifest is a commit, no matter when a process is killed. Only safetensors and JSON are loaded, which cannot
execute code.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import xxhash
from pydantic import Field
from safetensors import SafetensorError

from ft_dist.errors import CheckpointError, CheckpointVersionError, StorageError
from ft_dist.outside import Document, check_name, one_line, parse_object, validated
from ft_dist.storage.retry import patiently
from ft_dist.storage.tensors import open_tensor_file

MANIFEST = "manifest.json"
STATE = "state.json"
FORMAT_VERSION = 1
REPLACED, REMOVING = ".replaced", ".removing"
_MOST_DIGITS = 18
_FOREIGN = "Another program wrote this checkpoint."
_DTYPES = ("F64", "F32", "F16", "BF16", "I8", "U8")
"""Optimizer states may be quantised"""

Result = TypeVar("Result")
Fingerprint = dict[str, Any]
"""`bytes` and `xxh3` (128 bits, hexadecimal) of a file"""


class _File(Document):
    bytes: Annotated[int, Field(ge=0)]
    xxh3: str


class _Manifest(Document):
    version: int
    step: Annotated[int, Field(ge=0)]
    files: dict[str, _File]


@dataclass(frozen=True)
class Commit:
    """A complete checkpoint on disk."""

    folder: Path
    step: int

    def manifest(self) -> dict[str, Any]:
        """Its content, after its own checksum is verified. Raises CheckpointError, StorageError."""
        return parse_manifest(_read(self.folder / MANIFEST), self.folder / MANIFEST)

    def state(self) -> dict[str, Any]:
        """The content of state.json. Raises CheckpointError unless it is a JSON object, StorageError."""
        return parse_object(_read(self.folder / STATE), where=self.folder / STATE, error=CheckpointError)

    def fragment_files(self) -> list[Path]:
        return [self.folder / name for name in sorted(self.manifest()["files"]) if name.endswith(".safetensors")]

    def size_bytes(self) -> int:
        return sum(int(file["bytes"]) for file in self.manifest()["files"].values())


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step of a commit's folder name; None for any other name."""
    number = name.removeprefix("step-")
    plain = name.startswith("step-") and number.isascii() and number.isdecimal() and len(number) <= _MOST_DIGITS
    return int(number) if plain else None


def step_folder(root: Path, step: int) -> Path:
    return root / step_name(step)


def rank_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def split_key(key: str) -> tuple[str, str, int]:
    """Split `KIND/PARAMETER@START` into its parts. Raises CheckpointError for another name."""
    kind, _, rest = key.partition("/")
    name, _, start = rest.rpartition("@")
    if not kind or not name or not start.isascii() or not start.isdecimal() or len(start) > _MOST_DIGITS:
        raise CheckpointError(
            f"tensor {one_line(key)}: not named KIND/PARAMETER@START. Another program wrote this checkpoint."
        )
    return kind, name, int(start)


def commits(root: Path, *, wait_s: float | None = None) -> list[Commit]:
    """Complete checkpoints below `root`, oldest first. Their contents are not verified.

    A commit that was moved aside for its replacement counts until the replacement is in place. Raises StorageError if
    the file system does not answer for `wait_s` (default LOCAL_WAIT_S): that is not the same as no commits.
    """
    found: dict[int, Commit] = {}
    names = _names(root, wait_s)
    for suffix in (REPLACED, ""):
        for name in names:
            step = step_of(name.removesuffix(suffix)) if name.endswith(suffix) else None
            if step is not None and _exists(root / name / MANIFEST, wait_s):
                found[step] = Commit(root / name, step)
    return [found[step] for step in sorted(found)]


def remains(root: Path) -> list[Path]:
    """Folders below `root` that hold or held a commit, damaged ones and those without a manifest included.

    Raises StorageError as `commits` does.
    """
    found = []
    for name in _names(root, None):
        number, _, suffix = name.partition(".")
        if step_of(number) is not None and (not suffix or suffix == REPLACED[1:] or suffix.startswith("damaged")):
            found.append(root / name)
    return sorted(found)


def _names(root: Path, wait_s: float | None) -> list[str]:
    """Of everything in a folder; Path.glob would hide errors."""
    try:
        return patiently(lambda: os.listdir(root), wait_s=wait_s)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise _unanswered(root, error, root) from None


def _exists(path: Path, wait_s: float | None) -> bool:
    try:
        patiently(path.stat, wait_s=wait_s)
        return True
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise _unanswered(path, error, path.parent) from None


def _unanswered(path: Path, error: OSError, aside: Path) -> StorageError:
    return StorageError(
        f"{path}: cannot be read ({error.strerror}). Nothing was changed: run the same command again once the file "
        f"system answers, or move {aside} away to resume from what is left."
    )


def named_commit(folder: Path) -> Commit:
    """The commit in a folder that the user named. Raises CheckpointError."""
    step = step_of(folder.name)
    if step is None:
        raise CheckpointError(f"{folder}: a checkpoint folder is named step-N. Name one, for example step-00000100.")
    return Commit(folder, step)


def write_manifest(folder: Path, step: int, files: Mapping[str, Fingerprint]) -> None:
    """Seal the folder. `files` are already written and synced."""
    content = {"version": FORMAT_VERSION, "step": step, "files": dict(files)}
    write_synced(folder / MANIFEST, json.dumps(content | {"xxh3": _own_checksum(content)}, indent=1))


def publish(staging: Path, folder: Path) -> None:
    """Rename a sealed folder to its final name, replacing an earlier commit of the same step."""
    old = folder.with_name(f"{folder.name}{REPLACED}")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    try:
        staging.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def parse_manifest(text: bytes, where: object) -> dict[str, Any]:
    """Raises CheckpointError unless it is complete, CheckpointVersionError for another format version."""
    manifest = parse_object(text, where=where, error=CheckpointError)
    if manifest.pop("xxh3", None) != _own_checksum(manifest):
        raise CheckpointError(f"{where}: its checksum is not the committed one.")
    if manifest.get("version") != FORMAT_VERSION:
        raise CheckpointVersionError(
            f"{where}: format version {manifest.get('version')}, but this version of ft_dist reads {FORMAT_VERSION}. "
            "Resume with the version that wrote it, or start a new run with another output_dir."
        )
    validated(manifest, _Manifest, where=where, error=CheckpointError)
    for name in manifest["files"]:
        if "/" in check_name(name, where=where, error=CheckpointError):
            raise CheckpointError(f"{where}: names the file {name!r}, but a commit has no folders.")
    return manifest


def verify(commit: Commit, *, state_only: bool = False) -> None:
    """Raise CheckpointError naming the first file that is missing, truncated, altered or from another step.

    `state_only`: of the files, read state.json alone. Raises StorageError if the file system does not answer, which
    says nothing about the commit.
    """
    manifest = commit.manifest()
    if manifest["step"] != commit.step:
        raise CheckpointError(f"{commit.folder / MANIFEST}: belongs to step {manifest['step']}.")
    for name, expected in manifest["files"].items():
        if state_only and name != STATE:
            continue
        path = commit.folder / name
        check_fingerprint(path, _reading(path, fingerprint), expected)


def check_fingerprint(where: object, found: Fingerprint, expected: Fingerprint) -> None:
    if found["bytes"] != expected["bytes"]:
        raise CheckpointError(f"{where}: {found['bytes']} bytes, but {expected['bytes']} were committed.")
    if found["xxh3"] != expected["xxh3"]:
        raise CheckpointError(f"{where}: its checksum is not the committed one.")


def fingerprint(path: Path) -> Fingerprint:
    digest = xxhash.xxh3_128()
    size = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "xxh3": digest.hexdigest()}


def open_tensors(path: Path, *, framework: str) -> Any:
    """The open safetensors file of a rank. Raises CheckpointError if ft_dist did not write it, StorageError."""
    try:
        handle = patiently(lambda: open_tensor_file(path, framework=framework))
        for key in handle.keys():  # noqa: SIM118 - not a dictionary
            fragment = handle.get_slice(key)
            shape, dtype = fragment.get_shape(), fragment.get_dtype()
            if len(shape) != 1 or dtype not in _DTYPES:
                raise CheckpointError(
                    f"{path}: {one_line(key)} is {dtype} of shape {shape}, not flat numbers. {_FOREIGN}"
                )
        return handle
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a safetensors file ({one_line(error)}).") from None
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({one_line(error)}). Run the same command again.") from None


def remove(root: Path, step: int) -> None:
    """Delete a commit: renamed first, so that an interruption leaves no folder that looks like one."""
    folder = step_folder(root, step)
    doomed = folder.with_name(f"{folder.name}{REMOVING}")
    for place in (folder.with_name(f"{folder.name}{REPLACED}"), folder):
        with contextlib.suppress(OSError):
            shutil.rmtree(doomed, ignore_errors=True)
            place.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def set_aside(folder: Path) -> None:
    """Rename a damaged commit, so that it can be inspected but is neither found again nor counted by retention."""
    name, number = folder.name.partition(".")[0], 1
    place = folder.with_name(f"{name}.damaged")
    while place.exists():
        number += 1
        place = folder.with_name(f"{name}.damaged{number}")
    folder.rename(place)


def finish_removals(root: Path) -> None:
    for doomed in root.glob(f"step-*{REMOVING}"):
        shutil.rmtree(doomed, ignore_errors=True)


def write_synced(path: Path, text: str) -> Fingerprint:
    """Write, sync, rename into place, sync the folder: after a power cut the file is complete or absent."""
    content = text.encode()
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)
    return {"bytes": len(content), "xxh3": xxhash.xxh3_128_hexdigest(content)}


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: Path) -> bytes:
    return _reading(path, Path.read_bytes)


def _reading(path: Path, read: Callable[[Path], Result]) -> Result:
    """Raises CheckpointError for a missing file, StorageError if the file system keeps failing."""
    try:
        return patiently(lambda: read(path))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise CheckpointError(f"{path}: missing.") from None
    except OSError as error:
        raise _unanswered(path, error, path.parent) from None


def _own_checksum(manifest: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())
