"""Builds the parts of a run: data, world, engine.

The cheapest checks come first: config and tokenising before the process group exists, weights after.
"""

import os
from collections.abc import Callable

from ft_dist.check import check
from ft_dist.config import RunConfig
from ft_dist.data.open import open_stream
from ft_dist.data.prepare.report import prepare_data, report_lines
from ft_dist.engine.build import build_engine
from ft_dist.evaluate.held_out import HeldOut
from ft_dist.model.builtin import resolve_model
from ft_dist.model.tokenizer import configured_tokenizer
from ft_dist.observe.console import Console
from ft_dist.observe.recorder import log_rank_output
from ft_dist.preemption.listen import listen_for_notices
from ft_dist.preemption.stop import StopRequest
from ft_dist.preflight.ranks import form_world
from ft_dist.resources import resume_gc
from ft_dist.run.other_parts import other_parts
from ft_dist.run.out_of_memory import explain_out_of_memory, rows_after_shortage
from ft_dist.run.run import Run


def prepare_run(config: RunConfig, stop: StopRequest, *, free_memory: Callable[[], None]) -> Run:
    """Everything up to the first step. `free_memory` is called before weights are loaded. Raises UserError."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    facts = check(config, world_size=size)
    folder = resolve_model(config.model.path)
    tokenizer, notes = configured_tokenizer(config.model, folder)
    say = Console(enabled=rank == 0).say
    facts += listen_for_notices(config.preemption, stop, rank=rank, note=Console(enabled=True).note)
    resume_gc()
    train_set, eval_set, report = prepare_data(config, tokenizer, say=say)
    held_out = HeldOut.prepare(config, tokenizer, eval_set.store) if config.data.eval else None
    # output_dir stays untouched until every check that one process can make has passed
    log_file = log_rank_output(config, rank=rank)
    world, agreed = form_world(config, rank=rank, size=size)
    config = rows_after_shortage(config, world)
    free_memory()
    with explain_out_of_memory(config, world, flash=False):
        engine = build_engine(config, world, folder=folder, tokenizer=tokenizer)
    stream = open_stream(config, tokenizer, train_set)
    run = Run(config, world, engine, stream, stop, tokenizer=tokenizer, held_out=held_out, folder=folder)
    run.log_file = log_file
    run.start(facts=[*facts, *other_parts(engine, folder), *notes, *report_lines(report), *agreed], data_report=report)
    return run
