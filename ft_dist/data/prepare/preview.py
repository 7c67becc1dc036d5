"""Encode the first records of every source exactly as a run does: for `ft-dist check`, and for the self-check."""

from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from ft_dist.config.schema import DataConfig, RunConfig, SourceConfig
from ft_dist.data.encode.chunk import ChunkEncoder, SourceCounts, why_unusable
from ft_dist.data.prepare.build import prepare, rules_of, taken_as_it_is
from ft_dist.data.prepare.quality import marked_runs
from ft_dist.data.prepare.report import encoding_notes, encoding_problems
from ft_dist.data.read.check import REMOTE_SECONDS
from ft_dist.data.read.formats import format_of
from ft_dist.data.read.paths import is_prepared_set
from ft_dist.data.read.sources import read_raw_records
from ft_dist.errors import DataError, counted

RECORDS = 64
RUN_CHARACTERS = 120
SHOWN_RUNS = 6
"""Bounds the shown sample to about 700 characters"""
CUT = " ... "

Runs = list[dict[str, Any]]
"""A sample's text as runs of labelled and unlabelled tokens: {learnt, text}"""


@dataclass(frozen=True)
class Preview:
    """The first records of one source as the model will see them; for a prepared set, all of them."""

    kind: str
    """train or eval"""
    path: str
    counts: SourceCounts
    whole: bool
    """Whether these are all records of the source"""
    sample: Runs
    """The first sample, shortened; empty if none of the records can be used"""

    @property
    def over_length(self) -> int:
        """Records longer than data.max_length"""
        return self.counts.dropped_too_long + self.counts.truncated + self.counts.split_texts

    def lines(self, data: DataConfig, *, model_path: str) -> list[str]:
        """Facts for the console, then notes and warnings."""
        counts, name = self.counts, f"{self.kind} {self.path}"
        if not counts.samples:
            why = why_unusable(counts, data, model_path=model_path)
            return [f"warning: {name}: at its beginning, {why}"]
        first = "" if self.whole else f"the first {counted(counts.records, 'record')} give "
        fact = (
            f"{name}: {first}{counted(counts.samples, 'sample')} of {counts.tokens / counts.samples:,.0f} tokens on "
            f"average, {counts.labelled_tokens / counts.tokens:.0%} labelled; "
            f"{self.over_length or 'none'} over data.max_length={data.max_length}"
        )
        notes = [f"note: {name}: {note}" for note in encoding_notes(counts)]
        return [fact, *notes, *(f"warning: {name}: {problem}" for problem in encoding_problems(counts))]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        counts = self.counts
        return {
            "kind": self.kind,
            "path": self.path,
            "whole": self.whole,
            "records": counts.records,
            "samples": counts.samples,
            "tokens": counts.tokens,
            "labelled_tokens": counts.labelled_tokens,
            "over_max_length": self.over_length,
            "sample": self.sample,
        }


def preview_data(config: RunConfig, tokenizer: Any) -> list[Preview]:
    """One preview per source, training sources first.

    Raises DataError or ModelError as `prepare` does for these records: a chat template that is missing or rejects a
    record, a sample over max_length with data.too_long=error, a source without a usable record, a set that was prepared
    with other rules.
    """
    kinds = (("train", config.data.train), ("eval", config.data.eval))
    return [_preview(kind, source, config, tokenizer) for kind, sources in kinds for source in sources]


def _preview(kind: str, source: SourceConfig, config: RunConfig, tokenizer: Any) -> Preview:
    data = config.data
    if is_prepared_set(source.path):
        if kind == "eval" and config.evaluate.generate:
            next(read_raw_records(source))  # raises: answers need text
        report = taken_as_it_is(source, rules_of(tokenizer, data), wait_s=REMOTE_SECONDS, limit="").report
        shown = report["shown"][0] if report["shown"] else []
        return Preview(kind, source.path, SourceCounts(**report["counts"]), True, _shortened(shown))
    raws = list(islice(read_raw_records(source), RECORDS + 1))
    whole = len(raws) <= RECORDS
    encoder = ChunkEncoder.of(tokenizer, format_of(source, raws[0].parse()), data)
    chunk = encoder(1, raws[:RECORDS], False)
    if whole and not chunk.counts.samples:
        raise DataError(f"{source.path}: {why_unusable(chunk.counts, data, model_path=config.model.path)}")
    length = int(chunk.lengths[0]) if len(chunk.lengths) else 0
    runs = marked_runs(chunk.tokens[:length], chunk.mask[:length], tokenizer) if length else []
    return Preview(kind, source.path, chunk.counts, whole, _shortened(runs))


def first_samples(config: RunConfig, tokenizer: Any) -> list[npt.NDArray[Any]]:
    """Token ids (T,) of the first samples of data.train, as a run has them, for a run whose data are not prepared yet.

    Raises DataError or ModelError as `prepare` does for these records, and if no record of the source can be used.
    """
    source, data = config.data.train[0], config.data
    if is_prepared_set(source.path):
        store = prepare([source], tokenizer, data=data, model_path=config.model.path).store
        tokens, _, lengths = store.gather(np.arange(min(len(store), RECORDS)))
        return np.split(tokens, np.cumsum(lengths)[:-1])
    raws = read_raw_records(source)
    encoder: ChunkEncoder | None = None
    counts = SourceCounts()
    while records := list(islice(raws, RECORDS)):
        encoder = encoder or ChunkEncoder.of(tokenizer, format_of(source, records[0].parse()), data)
        chunk = encoder(counts.records + 1, records, False)
        counts.add(chunk.counts)
        if len(chunk.lengths):
            return np.split(chunk.tokens, np.cumsum(chunk.lengths)[:-1])
    raise DataError(f"{source.path}: {why_unusable(counts, data, model_path=config.model.path)}")


def _shortened(runs: Runs) -> Runs:
    """The same runs with the middle of long ones cut; of many runs, the first."""
    half = RUN_CHARACTERS // 2
    cut = [
        run | {"text": run["text"][:half] + CUT + run["text"][-half:]} if len(run["text"]) > RUN_CHARACTERS else run
        for run in runs[:SHOWN_RUNS]
    ]
    return cut if len(runs) <= SHOWN_RUNS else [*cut, {"learnt": False, "text": CUT}]
