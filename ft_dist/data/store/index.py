"""The index of a prepared set: its files, each with bytes and a BLAKE2b checksum.

Whoever may write to the place of a set may write anything into its index, and a disk may flip any byte of it. So names
are checked before they are joined to a folder, sums are checked against each other, and the index holds a checksum of
itself.
"""

import hashlib
import json
import re
from typing import Any

from pydantic import Field

from ft_dist.data.read.paths import INDEX
from ft_dist.errors import DataError, MissingFileError
from ft_dist.outside import Document, check_name, parse_object, validated
from ft_dist.storage import Storage

VERSION = 2
REPORT = "report.json"
SEAL = "checksum"
"""Key of an index or a progress file that holds the checksum of the rest; older sets have none"""

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*\.safetensors")


class FileEntry(Document):
    """One file of a set."""

    file: str
    bytes: int = Field(ge=0)
    checksum: str


class ShardEntry(FileEntry):
    samples: int = Field(gt=0, lt=2**48)
    tokens: int = Field(gt=0, lt=2**48)
    grouped: bool = False


class SetIndex(Document):
    fingerprint: str
    lengths: FileEntry
    shards: list[ShardEntry] = Field(min_length=1)
    sketches: FileEntry | None = None
    report: FileEntry | None = None
    made_with: dict[str, Any] = Field(default_factory=dict)
    samples: int | None = None
    tokens: int | None = None

    @property
    def files(self) -> list[FileEntry]:
        """What training reads."""
        return [self.lengths, *self.shards]


def read_index(storage: Storage) -> SetIndex:
    """Raises DataError if a folder has none, or if it is damaged, of another version or names files elsewhere."""
    try:
        text = storage.read_bytes(INDEX)
    except MissingFileError:
        raise DataError(f"{storage.url}: no {INDEX} found, so it is not a prepared set. Check the path.") from None
    return parse_index(text, where=storage.url_of(INDEX))


def parse_index(text: bytes, *, where: str) -> SetIndex:
    """Raises DataError as `read_index` does."""
    tree = parse_object(text, where=where, error=DataError)
    if tree.get("version") != VERSION:
        version = str(tree.get("version"))[:20]
        raise DataError(f"{where}: the token set has version {version}, not {VERSION}. Delete it and prepare again.")
    check_seal(tree, where=where)
    index = validated(tree, SetIndex, where=where, error=DataError)
    entries = [*index.files, *([index.sketches] if index.sketches else [])]
    for entry in entries:
        if not _NAME.fullmatch(check_name(entry.file, where=where, error=DataError)):
            raise DataError(f"{where}: names the file {entry.file!r}, but a set consists of NAME.safetensors.")
    if len({entry.file for entry in entries}) < len(entries):
        raise DataError(f"{where}: names a file twice. Prepare the set again.")
    for name in ("samples", "tokens"):
        total = sum(getattr(shard, name) for shard in index.shards)
        if getattr(index, name) not in (None, total):
            raise DataError(f"{where}: says {getattr(index, name)} {name}, but its shards hold {total}.")
    return index


def checksum_of(content: bytes) -> str:
    """BLAKE2b, 32 hexadecimal digits."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def sealed(tree: dict[str, Any]) -> bytes:
    """JSON that holds a checksum of itself."""
    return json.dumps({**tree, SEAL: checksum_of(json.dumps(tree).encode())}, indent=1).encode()


def check_seal(tree: dict[str, Any], *, where: str) -> None:
    """Raises DataError if JSON that `sealed` wrote does not match its own checksum."""
    rest = {key: value for key, value in tree.items() if key != SEAL}
    if SEAL in tree and tree[SEAL] != checksum_of(json.dumps(rest).encode()):
        raise DataError(f"{where}: damaged (it does not match its own checksum). Prepare the set again.")


def check_content(content: bytes, entry: FileEntry, *, where: str) -> None:
    """Raises DataError if a small file of a set is not the one that the index names."""
    if len(content) != entry.bytes or checksum_of(content) != entry.checksum:
        raise DataError(f"{where}: damaged (its checksum is not the one in {INDEX}). Prepare the set again.")
