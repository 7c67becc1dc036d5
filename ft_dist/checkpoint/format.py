"""The folder of one commit, and how it comes to be complete or not at all.

    checkpoints/step-00000100/
        rank-00000.safetensors    this rank's fragments: KIND/PARAMETER@START, flat fp32
        state.json                step, data position, counters, Adam's step, hash of the config
        manifest.json             every file with its size and xxh3-128 checksum, and its own; written last

KIND is `master`, `exp_avg` or `exp_avg_sq`; START counts elements of the flattened parameter. The folder is a commit
exactly when `manifest.json` exists: every rank has written and synced its file before rank 0 renames the manifest into
place. Readers ignore folders without one. safetensors and JSON only: nothing that is loaded can execute code.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from ft_dist.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Commit:
    """A complete checkpoint on disk."""

    folder: Path
    step: int

    def state(self) -> dict[str, Any]:
        return json.loads((self.folder / "state.json").read_text())

    def fragment_files(self) -> list[Path]:
        return sorted(self.folder.glob("rank-*.safetensors"))


def step_folder(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def rank_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.safetensors"


def commits(root: Path) -> list[Commit]:
    """Complete checkpoints below `root`, oldest first. Their contents are not yet verified."""
    found = []
    for folder in sorted(root.glob("step-*")):
        number = folder.name.removeprefix("step-")
        if number.isdigit() and (folder / MANIFEST).is_file():
            found.append(Commit(folder, int(number)))
    return found


def write_manifest(folder: Path, step: int) -> None:
    """Seal the folder: from the rename on it is a commit."""
    files = {path.name: _fingerprint(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}
    content = {"version": FORMAT_VERSION, "step": step, "files": files}
    write_synced(folder / MANIFEST, json.dumps(content | {"xxh3": _own_checksum(content)}, indent=1))


def verify(commit: Commit) -> None:
    """Raise CheckpointError naming the first file that is missing, cut short or altered."""
    try:
        manifest = json.loads((commit.folder / MANIFEST).read_text())
        checksum = manifest.pop("xxh3")
        version, files = manifest["version"], manifest["files"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{commit.folder / MANIFEST}: not readable ({error}).") from None
    if checksum != _own_checksum(manifest):
        raise CheckpointError(f"{commit.folder / MANIFEST}: its checksum is not the committed one.")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{commit.folder}: format version {version}, but this ft_dist reads {FORMAT_VERSION}.")
    for name, expected in files.items():
        path = commit.folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing.")
        if path.stat().st_size != expected["bytes"]:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes, but {expected['bytes']} were committed.")
        if _fingerprint(path)["xxh3"] != expected["xxh3"]:
            raise CheckpointError(f"{path}: its checksum is not the committed one.")


def remove(folder: Path) -> None:
    """Delete a checkpoint so that an interruption leaves no folder that looks complete."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def write_synced(path: Path, text: str) -> None:
    """Write, sync, rename into place, sync the folder: after a power cut it is there whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _own_checksum(manifest: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return {"bytes": path.stat().st_size, "xxh3": digest.hexdigest()}
