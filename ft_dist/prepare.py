"""Prepare a config's data ahead of its run: what `ft-dist prepare` does, and what a run does automatically at its
start."""

from collections.abc import Callable
from typing import Any

from ft_dist.config import RunConfig
from ft_dist.data.prepare.report import prepare_data, report_lines, shown_lines
from ft_dist.data.read.check import check_sources
from ft_dist.errors import DataError
from ft_dist.model.builtin import resolve_model
from ft_dist.model.quiet import quiet_process
from ft_dist.model.tokenizer import configured_tokenizer


def prepare_config(
    config: RunConfig, *, to: str | None, workers: int | None, strict: bool, say: Callable[[str], None]
) -> dict[str, Any]:
    """Build or find the sets of data.train and data.eval, print a summary with `say`, and return the report.

    The sets are stored in the cache, where the run finds them, or below `to` as train-0, train-1, ..., eval-0, ....
    Raises UserError for unusable data, and with `strict` for every warning too.
    """
    quiet_process()
    for fact in check_sources(config.data):
        say(fact)
    tokenizer, notes = configured_tokenizer(config.model, resolve_model(config.model.path))
    for note in notes:
        say(note)
    train, held_out, report = prepare_data(config, tokenizer, say=say, to=to, workers=workers)
    for line in (*shown_lines(report), *report_lines(report)):
        say(line)
    for kind, prepared in (("train", train), ("eval", held_out)):
        for one in prepared.sets:
            say(f"{kind} {one.name}: {'found' if one.reused else 'written'} at {one.place}")
    if strict and report["warnings"]:
        found = "; ".join(report["warnings"])
        raise DataError(f"--strict does not accept: {found}. Fix the data, or omit --strict.")
    return report
