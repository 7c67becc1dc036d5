"""What preparing found out, in lines that a person reads before the run begins."""

import time
from collections.abc import Callable

from ft_dist.data.prepare import Prepared, Progress, SourceCounts

FEW_SAMPLES = 50
PROGRESS_INTERVAL_S = 2.0


def report_lines(prepared: Prepared, kind: str) -> list[str]:
    """One line a source and one a problem; `kind` is train or eval."""
    lines = []
    for counts, reused in zip(prepared.counts, prepared.reused, strict=True):
        lines.append(f"{kind} {counts.name}: {_totals(counts)}{' (prepared earlier)' if reused else ''}")
        lines += [f"note: {counts.name}: {problem}" for problem in _problems(counts)]
    total = sum(counts.samples for counts in prepared.counts)
    if kind == "train" and total < FEW_SAMPLES:
        lines.append(f"note: only {total} training samples; fine-tuning needs at least {FEW_SAMPLES} to 100 good ones.")
    return lines


def progress_printer(say: Callable[[str], None]) -> Progress:
    """A progress callback for `prepare` that speaks every two seconds, so that short jobs stay silent."""
    started = last = time.monotonic()

    def progress(samples: int, tokens: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= PROGRESS_INTERVAL_S:
            last = now
            say(f"tokenising: {samples:,} samples, {tokens:,} tokens, {tokens / (now - started):,.0f} tokens/s")

    return progress


def _totals(counts: SourceCounts) -> str:
    share = counts.labelled_tokens / max(1, counts.tokens)
    return f"{counts.samples:,} samples, {counts.tokens:,} tokens, {share:.0%} labelled, format {counts.format}"


def _problems(counts: SourceCounts) -> list[str]:
    told = [
        (counts.dropped_too_long, f"samples dropped: longer than data.max_length (the longest has {counts.longest})"),
        (counts.truncated, "samples cut at data.max_length (data.too_long=truncate)"),
        (counts.dropped_no_label, "samples dropped: no labelled token was left"),
        (counts.split_texts, "texts longer than data.max_length split into blocks"),
        (counts.turns_rewritten, "assistant turns left out: the chat template rewrites them in later turns"),
        (counts.end_token_added, "samples given an end token that the chat template leaves out"),
        (counts.system_folded, "system prompts moved into the user turn: the chat template has no system role"),
    ]
    return [f"{count:,} {text}" for count, text in told if count]
