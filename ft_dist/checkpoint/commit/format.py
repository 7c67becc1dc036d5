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

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from ft_dist.errors import CheckpointError

MANIFEST = "manifest.json"
STATE = "state.json"
FORMAT_VERSION = 1

Fingerprint = dict[str, Any]
"""`bytes` and `xxh3` (128 bits, hexadecimal) of a file"""


@dataclass(frozen=True)
class Commit:
    """A complete checkpoint on disk."""

    folder: Path
    step: int

    def manifest(self) -> dict[str, Any]:
        """Its content, after its own checksum is verified. Raises CheckpointError."""
        return parse_manifest(_read(self.folder / MANIFEST), self.folder / MANIFEST)

    def state(self) -> dict[str, Any]:
        """The content of state.json. Raises CheckpointError unless it is a JSON object."""
        try:
            return dict(json.loads(_read(self.folder / STATE)))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{self.folder / STATE}: not readable ({error}).") from None

    def fragment_files(self) -> list[Path]:
        return [self.folder / name for name in sorted(self.manifest()["files"]) if name.endswith(".safetensors")]

    def size_bytes(self) -> int:
        return sum(int(file["bytes"]) for file in self.manifest()["files"].values())


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step of a commit's folder name; None for any other name."""
    number = name.removeprefix("step-")
    return int(number) if name.startswith("step-") and number.isdigit() else None


def step_folder(root: Path, step: int) -> Path:
    return root / step_name(step)


def rank_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def split_key(key: str) -> tuple[str, str, int]:
    """Split `KIND/PARAMETER@START` into its parts."""
    kind, _, rest = key.partition("/")
    name, _, start = rest.rpartition("@")
    return kind, name, int(start)


def commits(root: Path) -> list[Commit]:
    """Complete checkpoints below `root`, oldest first. Their contents are not verified."""
    found = []
    for folder in root.glob("step-*"):
        step = step_of(folder.name)
        if step is not None and (folder / MANIFEST).is_file():
            found.append(Commit(folder, step))
    return sorted(found, key=lambda commit: commit.step)


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
    old = folder.with_name(f"{folder.name}.replaced")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    staging.rename(folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def parse_manifest(text: bytes, where: object) -> dict[str, Any]:
    """Raises CheckpointError unless it is complete and has this format version."""
    try:
        manifest = json.loads(text)
        checksum = manifest.pop("xxh3")
        version = manifest["version"]
        for file in manifest["files"].values():
            file["bytes"], file["xxh3"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{where}: not readable ({error}).") from None
    if checksum != _own_checksum(manifest):
        raise CheckpointError(f"{where}: its checksum is not the committed one.")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{where}: format version {version}, but this version of ft_dist reads {FORMAT_VERSION}.")
    return dict(manifest)


def verify(commit: Commit, *, state_only: bool = False) -> None:
    """Raise CheckpointError naming the first file that is missing, truncated, altered or from another step.

    `state_only`: of the files, read state.json alone.
    """
    manifest = commit.manifest()
    if manifest["step"] != commit.step:
        raise CheckpointError(f"{commit.folder / MANIFEST}: belongs to step {manifest['step']}.")
    for name, expected in manifest["files"].items():
        if state_only and name != STATE:
            continue
        path = commit.folder / name
        try:
            found = fingerprint(path)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: missing.") from None
        except OSError as error:
            raise CheckpointError(f"{path}: not readable ({error.strerror}).") from None
        check_fingerprint(path, found, expected)


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


def remove(folder: Path) -> None:
    """Delete a checkpoint, manifest first, so that an interruption leaves no folder that looks complete."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


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
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: not readable ({error.strerror}).") from None


def _own_checksum(manifest: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())
