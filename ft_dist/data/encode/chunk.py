"""Turns a chunk of records into tokens, masks and the counts of the report: the work of one worker process.

A sample over `max_length` tokens follows `too_long`; plain text and token ids are instead split into consecutive
blocks of `max_length` that overlap by one token, so that every token but a document's first is predicted exactly once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from ft_dist.config.schema import DataConfig
from ft_dist.data.encode.minhash import Keys, Signatures, sketch
from ft_dist.data.encode.template import Encoded, Encoder
from ft_dist.data.read.formats import RecordFormat, Sample
from ft_dist.data.read.text_files import RawRecord, Record
from ft_dist.errors import DataError


@dataclass(slots=True)
class SourceCounts:
    """Counts of one source's records and samples."""

    name: str = ""
    format: str = ""
    records: int = 0
    samples: int = 0
    """Samples in the store; more than the records if long text was split"""
    tokens: int = 0
    labelled_tokens: int = 0
    dropped_too_long: int = 0
    truncated: int = 0
    dropped_no_label: int = 0
    split_texts: int = 0
    turns_rewritten: int = 0
    end_token_added: int = 0
    system_folded: int = 0
    dates_pinned: int = 0
    roles_repeated: int = 0
    """Records in which the user or the assistant speaks twice in a row"""
    unanswered: int = 0
    """Records that end with a turn other than the assistant's"""
    longest: int = 0
    """Tokens of the longest record before truncation"""

    def add(self, other: "SourceCounts") -> None:
        for name in COUNTED:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.longest = max(self.longest, other.longest)


COUNTED = tuple(f.name for f in fields(SourceCounts) if f.name not in ("name", "format", "longest"))
"""Counts that sum over chunks and sources"""


@dataclass(frozen=True, slots=True)
class EncodedChunk:
    """Concatenated samples: tokens (T,) uint16 or uint32, mask (T,), lengths and labelled (S,), keys (K, KEYS)."""

    tokens: npt.NDArray[Any]
    mask: npt.NDArray[np.bool_]
    lengths: npt.NDArray[np.uint32]
    labelled: npt.NDArray[np.uint32]
    keys: Keys
    signatures: Signatures
    counts: SourceCounts


@dataclass(slots=True)
class ChunkEncoder:
    """Encodes chunks of one source; sent to every worker process."""

    tokenizer: Any
    record_format: RecordFormat
    max_length: int
    too_long: str
    vocabulary: int
    _encoder: Encoder | None = field(default=None, init=False)

    @classmethod
    def of(cls, tokenizer: Any, record_format: RecordFormat, data: DataConfig) -> "ChunkEncoder":
        vocabulary = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=0))
        return cls(tokenizer, record_format, data.max_length, data.too_long, vocabulary)

    @property
    def dtype(self) -> Any:
        return np.uint16 if self.vocabulary <= 2**16 else np.uint32

    def __call__(self, first_number: int, raws: Sequence[Record | RawRecord], signatures: bool) -> EncodedChunk:
        """`first_number` is the first record's number in its source, from 1. Raises DataError, ModelError."""
        self._encoder = self._encoder or Encoder(self.tokenizer)
        self._encoder.notes.clear()
        samples = [self.record_format.sample(raw.parse()) for raw in raws]
        counts = SourceCounts(records=len(samples))
        pieces: list[Encoded] = []
        kept: list[int] = []
        for index, encoded in enumerate(self._encode(samples)):
            of_sample = self._fit(samples[index], encoded, counts)
            pieces += of_sample
            if of_sample:
                kept.append(index)
        for name, count in self._encoder.notes.items():
            setattr(counts, name, count)
        for sample in samples:
            _count_turns(sample, counts)
        numbers = [first_number + index for index in kept]
        keys, signed = sketch([samples[index] for index in kept], numbers, signatures=signatures)
        return self._join(pieces, keys, signed, counts)

    def _encode(self, samples: list[Sample]) -> list[Encoded]:
        assert self._encoder is not None
        texts = iter(self._encoder.encode_batch([sample for sample in samples if sample.tokens is None]))
        return [next(texts) if sample.tokens is None else self._ready(sample) for sample in samples]

    def _ready(self, sample: Sample) -> Encoded:
        assert sample.tokens is not None
        if max(sample.tokens) >= self.vocabulary:
            raise DataError(
                f"{sample.where}: token {max(sample.tokens)}, but the tokenizer has only {self.vocabulary} tokens. "
                "Another tokenizer produced these ids. Prepare from the text."
            )
        return Encoded(np.array(sample.tokens, np.uint32), np.ones(len(sample.tokens), np.bool_))

    def _fit(self, sample: Sample, encoded: Encoded, counts: SourceCounts) -> list[Encoded]:
        """The sample as stored under `max_length`: whole, truncated, split into blocks, or dropped."""
        length, limit = len(encoded.tokens), self.max_length
        counts.longest = max(counts.longest, length)
        if length <= limit:
            pieces = [encoded]
        elif sample.messages is None:
            counts.split_texts += 1
            starts = range(0, length - 1, limit - 1)
            pieces = [Encoded(encoded.tokens[at : at + limit], encoded.mask[at : at + limit]) for at in starts]
        elif self.too_long == "error":
            raise DataError(
                f"{sample.where}: {length} tokens, but data.max_length={limit}. "
                "Raise it, shorten the sample, or set data.too_long to drop or truncate."
            )
        elif self.too_long == "drop":
            counts.dropped_too_long += 1
            return []
        else:
            pieces = [Encoded(encoded.tokens[:limit], encoded.mask[:limit])]
            counts.truncated += int(pieces[0].mask[1:].any())
        learnable = [piece for piece in pieces if piece.mask[1:].any()]
        counts.dropped_no_label += not learnable
        return learnable

    def _join(self, pieces: list[Encoded], keys: Keys, signed: Signatures, counts: SourceCounts) -> EncodedChunk:
        masks = [piece.mask for piece in pieces]
        lengths = np.array([len(mask) for mask in masks], np.uint32)
        labelled = np.array([np.count_nonzero(mask[1:]) for mask in masks], np.uint32)
        counts.samples = len(pieces)
        counts.tokens = int(lengths.sum())
        counts.labelled_tokens = int(labelled.sum())
        tokens = np.concatenate([np.zeros(0, self.dtype), *(piece.tokens.astype(self.dtype) for piece in pieces)])
        mask = np.concatenate([np.zeros(0, np.bool_), *masks])
        return EncodedChunk(tokens, mask, lengths, labelled, keys, signed, counts)


def why_unusable(counts: SourceCounts, data: DataConfig, *, model_path: str) -> str:
    """Why none of the counted records gave a sample, and what to change."""
    reasons = []
    if counts.dropped_too_long:
        reasons.append(
            f"{counts.dropped_too_long} over data.max_length={data.max_length} (longest: {counts.longest} tokens)"
        )
    if counts.dropped_no_label:
        reasons.append(f"{counts.dropped_no_label} without a labelled token")
    if counts.turns_rewritten:
        reasons.append(f"{counts.turns_rewritten} assistant turns rewritten by the chat template of {model_path}")
    subject = f"none of {counts.records:,} records can" if counts.records > 1 else "its only record cannot"
    return f"{subject} be used: {', '.join(reasons)}. {advice_if_unusable(data.too_long)}"


def advice_if_unusable(too_long: str) -> str:
    """What to change if no record of a source can be used."""
    truncate = "" if too_long == "truncate" else " set data.too_long=truncate,"
    return f"Raise data.max_length,{truncate} or set model.chat_template."


def _count_turns(sample: Sample, counts: SourceCounts) -> None:
    if sample.messages is None:
        return
    roles = [message["role"] for message in sample.messages]
    counts.roles_repeated += any(a == b != "tool" for a, b in pairwise(roles))
    counts.unanswered += roles[-1] != "assistant"
