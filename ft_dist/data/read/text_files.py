"""Records of JSONL, JSON, CSV, TSV and text files with the standard library, in bounded memory.

Files are read one line at a time, JSON arrays one block at a time; `.gz` and `.zst` are decompressed on the fly. A
record over MAX_RECORD_BYTES is refused with its line, so that a broken line cannot exhaust memory. A text file holds
documents separated by blank lines; each document becomes one record `{"text": ...}`.
"""

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from ft_dist.errors import DataError

MAX_RECORD_BYTES = 2**24
"""Largest line or record. Tokenising it takes about 50 times as much memory, for tokens and offsets."""

MAX_DEPTH = 100
"""Deepest nesting of a record: what walks over it may recurse"""

BLOCK_BYTES = 2**20
FIRST_BYTES = 2**12
ZSTD_BYTES = 2**10
"""Compressed bytes read at a time: one kilobyte can expand to 32 MB"""


@dataclass(frozen=True, slots=True)
class Record:
    """One entry of a source: its fields, and its place (`FILE line N`)."""

    fields: dict[str, Any]
    where: str

    def parse(self) -> "Record":
        return self


@dataclass(frozen=True, slots=True)
class RawRecord:
    """A JSON line that is not parsed yet."""

    line: str
    where: str

    def parse(self) -> Record:
        """Raises DataError if the line is not a JSON object."""
        return Record(json_object(_parse(self.line, self.where), self.where), self.where)


def read_jsonl(file: Path) -> Iterator[RawRecord]:
    for number, line in _lines(file):
        if line.strip():
            yield RawRecord(line, f"{file} line {number}")


def read_json(file: Path) -> Iterator[Record | RawRecord]:
    """An array of objects, or JSON lines, which many `.json` files contain."""
    with _open(file) as stream:
        start = _reading(file, lambda: stream.read(FIRST_BYTES)).removeprefix(codecs.BOM_UTF8).lstrip()
    if start.startswith(b"["):
        yield from _JsonArray(file).records()
    else:
        yield from read_jsonl(file)


def read_csv(file: Path, delimiter: str) -> Iterator[Record]:
    csv.field_size_limit(MAX_RECORD_BYTES)
    start, row_bytes = 1, 0

    def bounded() -> Iterator[str]:
        nonlocal row_bytes
        for _, line in _lines(file):
            row_bytes += len(line)
            if row_bytes > MAX_RECORD_BYTES:  # an unclosed quote would consume the rest of the file
                raise _too_long(f"{file} line {start}", "row", "Is a quote left open?")
            yield line

    rows = csv.reader(bounded(), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise DataError(f"{file} line {start}: not valid CSV ({error}). Check its quotes.") from None
        if row is None:
            return
        where, start, row_bytes = f"{file} line {start}", rows.line_num + 1, 0
        if not row:
            continue
        if header is None:
            header = [name.strip() for name in row]
            if len(set(header)) < len(header):
                raise DataError(f"{where}: two columns have the same name ({names_of(header)}). Rename one.")
            continue
        if len(row) != len(header):
            raise DataError(f"{where}: {len(row)} values, but the header has {len(header)} ({names_of(header)}).")
        yield Record(dict(zip(header, row, strict=True)), where)


def read_text(file: Path) -> Iterator[Record]:
    block: list[str] = []
    start, size = 1, 0
    for number, line in _lines(file):
        if line.strip():
            if not block:
                start, size = number, 0
            block.append(line)
            size += len(line)
            if size > MAX_RECORD_BYTES:
                raise _too_long(f"{file} line {start}", "document", "Separate documents with blank lines.")
        elif block:
            yield Record({"text": "".join(block).rstrip("\r\n")}, f"{file} line {start}")
            block = []
    if block:
        yield Record({"text": "".join(block).rstrip("\r\n")}, f"{file} line {start}")


def _open(file: Path) -> BinaryIO:
    try:
        if file.name.lower().endswith(".gz"):
            return cast(BinaryIO, _Gzip(file))
        if file.name.lower().endswith(".zst"):
            return cast(BinaryIO, io.BufferedReader(_Zstd(file), BLOCK_BYTES))
        return file.open("rb")
    except OSError as error:
        raise unreadable(file, error) from None


def unreadable(file: Path, error: OSError) -> DataError:
    return DataError(f"{file}: cannot be read ({error.strerror}). Check its permissions and the disk.")


def _reading(file: Path, read: Callable[[], bytes]) -> bytes:
    try:
        return read()
    except OSError as error:
        raise unreadable(file, error) from None


class _Zstd(io.RawIOBase):
    """zstd frames (RFC 8878) in sequence, as `zstd` and `pzstd` write them; a truncated one raises."""

    def __init__(self, file: Path) -> None:
        import zstandard

        self._file = file
        self._error = zstandard.ZstdError
        self._start = zstandard.ZstdDecompressor().decompressobj
        self._packed = file.open("rb")
        self._frame, self._begun = self._start(), False
        self._rest = self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            packed = self._rest or self._packed.read(ZSTD_BYTES)
            if not packed:
                if self._begun:
                    raise self._damaged("it is truncated")
                return 0
            try:
                self._ready = self._frame.decompress(packed)
            except self._error as error:
                raise self._damaged(str(error)) from None
            self._rest, self._begun = b"", True
            if self._frame.eof:
                self._rest = self._frame.unused_data
                self._frame, self._begun = self._start(), False
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size

    def close(self) -> None:
        self._packed.close()
        super().close()

    def _damaged(self, reason: str) -> DataError:
        return DataError(f"{self._file}: damaged zstd data ({reason}). Fetch it again.")


class _Gzip(gzip.GzipFile):
    """Reports damage as an error in the file, however it is read."""

    def __init__(self, file: Path) -> None:
        super().__init__(file, "rb")
        self._file = file
        self._lines = 0

    def read(self, size: int | None = -1) -> bytes:
        return self._guard(super().read, size)

    def readline(self, size: int | None = -1) -> bytes:
        line = self._guard(super().readline, size)
        self._lines += 1
        return line

    def _guard(self, read: Any, size: int | None) -> bytes:
        try:
            return bytes(read(size))
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(
                f"{self._file} after line {self._lines}: damaged gzip data ({error}). Fetch it again."
            ) from None


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, text with its line end), decoded line by line, so that a bad byte has a line number."""
    number, offset = 0, 0
    with _open(file) as stream:
        while raw := _reading(file, lambda: stream.readline(MAX_RECORD_BYTES + 1)):
            number += 1
            if len(raw) > MAX_RECORD_BYTES:
                raise _too_long(f"{file} line {number}", "line", "Split or remove it.")
            yield number, _decode(raw, file, number, offset)
            offset += len(raw)


def _too_long(where: str, kind: str, fix: str) -> DataError:
    return DataError(f"{where}: a {kind} of more than {MAX_RECORD_BYTES / 2**20:g} MiB, the limit. {fix}")


def _decode(raw: bytes, file: Path, number: int, offset: int) -> str:
    if number == 1 and raw[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise DataError(f"{file} line 1: UTF-16 text. Save the file as UTF-8.")
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(file, number, raw[error.start], offset + error.start) from None


def _not_utf8(file: Path, number: int, byte: int, offset: int) -> DataError:
    return DataError(
        f"{file} line {number}: not UTF-8 text (byte 0x{byte:02x} at offset {offset}). Save the file as UTF-8."
    )


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text.rstrip())  # an error at a line break would count columns of the next line
    except json.JSONDecodeError as error:
        raise _not_json(where, error.msg, error.colno) from None
    except ValueError:
        raise _too_many_digits(where) from None
    except RecursionError:
        raise _too_deep(where) from None


def _too_many_digits(where: str) -> DataError:
    return DataError(f"{where}: holds an integer of thousands of digits. Fix or remove it.")


def _too_deep(where: str) -> DataError:
    return DataError(f"{where}: nested deeper than {MAX_DEPTH} levels. Fix or remove it.")


def check_depth(value: Any, where: str) -> None:
    """Raises DataError if lists and objects are nested deeper than MAX_DEPTH."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for one in level
            for inner in (one.values() if isinstance(one, dict) else one)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise _too_deep(where)


def _not_json(where: str, reason: str, column: int) -> DataError:
    return DataError(f"{where}: not valid JSON ({reason} at column {column}). Fix or remove it.")


def is_text(text: str) -> bool:
    """False for half of a surrogate pair, which JSON can write and no tokenizer can read."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def names_of(fields: Iterable[Any]) -> str:
    """Names of columns for a message of one line, cut to fit in it."""
    text = ", ".join("".join(ch if ch.isprintable() else "?" for ch in str(name)[:40]) for name in fields) or "none"
    return text if len(text) <= 120 else f"{text[:117]}..."


def json_object(value: Any, where: str) -> dict[str, Any]:
    """Raises DataError if a JSON value is not an object, or nested too deep."""
    if not isinstance(value, dict):
        raise DataError(f"{where}: is {type(value).__name__}, but a record is a JSON object {{...}}.")
    check_depth(value, where)
    return value


class _JsonArray:
    """Reads `[{...}, ...]` one element at a time, whatever its line breaks."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._scanner = json.JSONDecoder()
        self._text = ""  # read, not yet consumed
        self._at = 0
        self._line, self._counted = 1, 0  # line of the position _counted
        self._bytes_read = 0
        self._ended = False

    def records(self) -> Iterator[Record]:
        with _open(self.file) as stream:
            self._stream = stream
            self._next_is("[")
            number, more = 0, not self._next_is("]")
            while more:
                number += 1
                self._peek()
                where = f"{self.file} line {self._line_at(self._at)} (record {number})"
                yield Record(json_object(self._element(where), where), where)
                more = self._next_is(",")
                if not more and not self._next_is("]"):
                    raise self._fault("Expecting ',' or ']'", self._at)
            if self._peek():
                raise self._fault("text after the end of the array", self._at)

    def _element(self, where: str) -> Any:
        while True:
            try:
                value, self._at = self._scanner.raw_decode(self._text, self._at)
                return value
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - 12
                if not cut or self._ended:
                    raise self._fault(error.msg, error.pos) from None
            except ValueError:
                raise _too_many_digits(where) from None
            except RecursionError:
                raise _too_deep(where) from None
            if len(self._text) - self._at > MAX_RECORD_BYTES:
                raise _too_long(where, "record", "Is a quote or a bracket left open?")
            self._read_on()

    def _next_is(self, wanted: str) -> bool:
        found = self._peek() == wanted
        self._at += found
        return found

    def _peek(self) -> str:
        """The next non-whitespace character; "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._read_on()

    def _read_on(self) -> None:
        line = self._line_at(self._at)
        raw = _reading(self.file, lambda: self._stream.read(BLOCK_BYTES))
        self._ended = not raw
        try:
            more = self._decoder.decode(raw, final=self._ended)
        except UnicodeDecodeError as error:
            line += self._text.count("\n", self._at) + error.object.count(b"\n", 0, error.start)
            carried = len(error.object) - len(raw)
            byte, offset = error.object[error.start], self._bytes_read - carried + error.start
            raise _not_utf8(self.file, line, byte, offset) from None
        self._bytes_read += len(raw)
        self._text, self._at, self._counted = self._text[self._at :] + more, 0, 0

    def _line_at(self, position: int) -> int:
        """Positions come in increasing order, so each character is visited once."""
        self._line += self._text.count("\n", self._counted, position)
        self._counted = max(self._counted, position)
        return self._line

    def _fault(self, reason: str, position: int) -> DataError:
        column = position - self._text.rfind("\n", 0, position)
        return _not_json(f"{self.file} line {self._line_at(position)}", reason, column)
