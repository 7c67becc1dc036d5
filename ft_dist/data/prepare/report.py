"""The data report: for the console before a run, and for `report.json`."""

import time
from collections.abc import Callable
from typing import Any

from ft_dist.config.schema import RunConfig
from ft_dist.data.encode.chunk import SourceCounts
from ft_dist.data.encode.template import DATE
from ft_dist.data.prepare.build import Prepared, PreparedSet, Progress, prepare
from ft_dist.data.prepare.quality import leakage
from ft_dist.errors import counted

FEW_SAMPLES = 50
FEW_GOOD_SAMPLES = 100
PROGRESS_INTERVAL_S = 2.0
PACKED_SHARE = 0.99
"""Filled share of a packed row, for the estimate of steps"""
SHOWN_CHARACTERS = 500

# OpenAI's own rule for the epochs of a fine-tuning run ("Data preparation and analysis for chat model fine-tuning",
# cookbook 2023): three, more for few examples, fewer for very many.
_EPOCHS, _MIN_EXAMPLES, _MAX_EXAMPLES, _MOST_EPOCHS = 3, 100, 25_000, 25


def prepare_data(
    config: RunConfig,
    tokenizer: Any,
    *,
    say: Callable[[str], None],
    to: str | None = None,
    workers: int | None = None,
) -> tuple[Prepared, Prepared, dict[str, Any]]:
    """Training and held-out sets of a run, built or found, and the report on both. `to`: a folder or URL for them.

    Raises UserError as `prepare` does.
    """
    train, held_out = (
        prepare(
            sources,
            tokenizer,
            data=config.data,
            model_path=config.model.path,
            to=None if to is None else f"{to.rstrip('/')}/{kind}",
            workers=workers,
            on_progress=progress_printer(say),
        )
        for kind, sources in (("train", [] if config.data.live else config.data.train), ("eval", config.data.eval))
    )
    return train, held_out, data_report(config, train, held_out)


def data_report(config: RunConfig, train: Prepared, held_out: Prepared) -> dict[str, Any]:
    """The whole report: totals, each source, leakage, recommendations, and `notes` and `warnings` as text."""
    report: dict[str, Any] = {"train": train.report, "eval": held_out.report}
    report["leakage"] = leakage([one.place for one in train.sets], [one.place for one in held_out.sets])
    report["recommended_epochs"] = recommended_epochs(train.report["samples"])
    report["estimated_steps"] = estimated_steps(config, train, packs=config.data.packs)
    sets = [(kind, one) for kind, of_kind in (("train", train), ("eval", held_out)) for one in of_kind.sets]
    report["notes"] = [f"{kind} {one.name}: {note}" for kind, one in sets for note in encoding_notes(_counts(one))]
    report["warnings"] = [f"{kind} {one.name}: {problem}" for kind, one in sets for problem in _problems(one)]
    report["warnings"] += _leaks(report["leakage"], train, held_out) + _few(train)
    return report


def report_lines(report: dict[str, Any]) -> list[str]:
    """One line per source and per warning."""
    lines = []
    for kind in ("train", "eval"):
        lines += [f"{kind} {source['path']}: {_totals(source)}" for source in report[kind]["sources"]]
    if report["train"]["sources"]:
        steps, epochs = report["estimated_steps"], report["recommended_epochs"]
        are = "is" if epochs == 1 else "are"
        lines.append(
            f"about {counted(steps, 'step')}; for this many samples {counted(epochs, 'epoch')} {are} a good start"
        )
    lines += [f"note: {note}" for note in report["notes"]]
    return [*lines, *(f"warning: {warning}" for warning in report["warnings"])]


def shown_lines(report: dict[str, Any]) -> list[str]:
    """Samples as the model sees them, with labelled text in [[ and ]], and the lengths of all."""
    lines = []
    for source in report["train"]["sources"]:
        lengths = source["lengths"]
        quantiles = ", ".join(f"{name} {value:,}" for name, value in lengths.items() if name != "bins")
        lines.append(f"{source['path']}: tokens per sample: {quantiles}")
        most = max(entry["samples"] for entry in lengths["bins"])
        for entry in lengths["bins"]:
            lines.append(
                f"  up to {entry['up_to']:>9,} {'#' * -(-40 * entry['samples'] // most):40} {entry['samples']:,}"
            )
        for number, runs in enumerate(source["shown"], start=1):
            text = in_brackets(runs)
            cut = text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + " ..."
            lines.append(f"sample {number} of {source['path']} as the model sees it, [[labelled]]:")
            lines += [f"  | {line}" for line in cut.splitlines()]
    return lines


def in_brackets(runs: list[dict[str, Any]]) -> str:
    """The text of a sample, its labelled runs in [[ and ]]."""
    return "".join(f"[[{run['text']}]]" if run["learnt"] else run["text"] for run in runs)


def progress_printer(say: Callable[[str], None]) -> Callable[[Progress], None]:
    """A callback for `prepare` that reports every two seconds, so that short jobs stay silent."""
    started = last = time.monotonic()
    first: Progress | None = None

    def on_progress(now: Progress) -> None:
        nonlocal last, first
        moment = time.monotonic()
        first = first or now  # excludes work done before an interruption
        if moment - last < PROGRESS_INTERVAL_S:
            return
        last = moment
        rate = (now.tokens - first.tokens) / (moment - started)
        left = ""
        if now.share is not None and first.share is not None and now.share > first.share:
            eta_s = (moment - started) * (1 - now.share) / (now.share - first.share)
            left = f", {now.share:.0%} done, ETA {_duration(eta_s)}"
        say(f"tokenising: {now.records:,} records, {now.tokens:,} tokens, {rate:,.0f} tokens/s{left}")

    return on_progress


def recommended_epochs(samples: int) -> int:
    """Recommended epochs, 1 to 25."""
    if samples * _EPOCHS < _MIN_EXAMPLES:
        return min(_MOST_EPOCHS, -(-_MIN_EXAMPLES // max(1, samples)))
    return max(1, _MAX_EXAMPLES // samples) if samples * _EPOCHS > _MAX_EXAMPLES else _EPOCHS


def estimated_steps(config: RunConfig, train: Prepared, *, packs: bool) -> int:
    """Estimated optimizer steps, before packing: rows filled to PACKED_SHARE, or a row per sample."""
    epochs, limit = config.optim.most_epochs, config.optim.max_steps
    if epochs is None:
        assert limit is not None, "without epochs, optim.max_steps ends the run"
        return limit
    rows = 0.0
    for one in train.sets:
        counts = one.report["counts"]
        rows += one.weight * (
            counts["tokens"] / (config.data.max_length * PACKED_SHARE) if packs else counts["samples"]
        )
    steps = epochs * max(1, -(-int(rows + 0.999) // config.batch.global_rows))
    return min(steps, limit or steps)


def _totals(source: dict[str, Any]) -> str:
    counts = source["counts"]
    share = counts["labelled_tokens"] / max(1, counts["tokens"])
    return (
        f"{counted(counts['samples'], 'sample')}, {counts['tokens']:,} tokens, {share:.0%} labelled, "
        f"format {counts['format']}, "
        f"median {source['lengths']['median']:,} tokens, longest {source['lengths']['longest']:,}"
    )


def encoding_notes(counts: SourceCounts) -> list[str]:
    """Expected changes to the data."""
    return _told(
        (counts.split_texts, "text", "longer than data.max_length split into blocks"),
        (counts.end_token_added, "sample", "got an end token that the chat template omits"),
        (counts.system_folded, "system prompt", "moved into the user turn: the chat template has no system role"),
        (counts.dates_pinned, "sample", f"with {DATE:%d %B %Y} where the chat template prints today's date"),
    )


def encoding_problems(counts: SourceCounts) -> list[str]:
    """Findings about single records that need attention."""
    return _told(
        (counts.dropped_too_long, "sample", f"dropped: longer than data.max_length (the longest has {counts.longest})"),
        (counts.truncated, "sample", "truncated at data.max_length (data.too_long=truncate)"),
        (counts.dropped_no_label, "sample", "dropped: no labelled token was left"),
        (counts.turns_rewritten, "assistant turn", "left out: the chat template rewrites it in later turns"),
        (counts.roles_repeated, "record", "with roles out of order: one role appears twice in a row"),
        (counts.unanswered, "record", "without an answer at the end: the last turn is not the assistant's"),
    )


def _problems(one: PreparedSet) -> list[str]:
    """Findings that need attention."""
    repeats, near, against = (one.report[name] for name in ("duplicates", "near_duplicates", "contradictions"))
    return encoding_problems(_counts(one)) + _told(
        (repeats["records"], "duplicate record", _pairs(repeats).lstrip()),
        (near["records"], "near duplicate", f"among the records{_pairs(near)}"),
        (against["prompts"], "prompt", f"with different answers{_pairs(against)}"),
    )


def _counts(one: PreparedSet) -> SourceCounts:
    return SourceCounts(**one.report["counts"])


def _told(*findings: tuple[int, str, str]) -> list[str]:
    """One line per finding with a count above 0: what is counted, and what happened to it."""
    return [f"{counted(count, noun)} {text}".rstrip() for count, noun, text in findings if count]


def _pairs(finding: dict[str, Any]) -> str:
    pairs = ", ".join(f"{a} and {b}" for a, b in finding["examples"][:3])
    return f" (records {pairs})" if pairs else ""


def _leaks(found: dict[str, Any], train: Prepared, held_out: Prepared) -> list[str]:
    if not found["equal"] and not found["near"]:
        return []
    names = {one.place: one.name for one in (*train.sets, *held_out.sets)}
    pairs = "; ".join(
        f"record {record} of {names[place]} and {other} of {names[trained]}"
        for place, record, trained, other in found["examples"][:3]
    )
    return [
        f"eval: of {found['records']:,} held-out records {found['equal']:,} are in the training data and "
        f"{found['near']:,} nearly match it ({pairs}): their scores do not measure performance on new data"
    ]


def _few(train: Prepared) -> list[str]:
    samples = train.report["samples"]
    if samples >= FEW_GOOD_SAMPLES:
        return []
    return [
        f"only {counted(samples, 'training sample')}; fine-tuning needs at least {FEW_SAMPLES} to {FEW_GOOD_SAMPLES} "
        "good ones"
    ]


def _duration(seconds: float) -> str:
    minutes, secs = divmod(int(seconds + 0.5), 60)
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{secs:02d}s"
