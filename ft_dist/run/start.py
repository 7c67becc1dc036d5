"""Builds the parts of a run: data, world, engine.

The cheapest checks come first: config and tokenising before the process group exists, weights after.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist

from ft_dist.check import check, check_method
from ft_dist.config import RunConfig
from ft_dist.data.open import open_stream
from ft_dist.data.prepare.report import estimated_steps, prepare_data, report_lines
from ft_dist.engine.build import build_engine
from ft_dist.errors import ConfigError
from ft_dist.evaluate.held_out import HeldOut
from ft_dist.model.builtin import local_folder, resolve_model
from ft_dist.model.tokenizer import configured_tokenizer
from ft_dist.observe.console import Console
from ft_dist.observe.patient import AppendedFile
from ft_dist.observe.recorder import log_rank_output
from ft_dist.preemption.listen import listen_for_notices
from ft_dist.preemption.stop import StopRequest
from ft_dist.preflight.ranks import form_world, meet, share_refusal
from ft_dist.resources import resume_gc
from ft_dist.run.lock import lock_folder, refuse_if_locked
from ft_dist.run.out_of_memory import explain_out_of_memory, rows_after_shortage
from ft_dist.run.proof.other_parts import other_parts
from ft_dist.run.proof.self_check import self_check
from ft_dist.run.run import Run


def prepare_run(config: RunConfig, stop: StopRequest, *, free_memory: Callable[[], None]) -> Run:
    """Everything up to the first step. `free_memory` is called before weights are loaded. Raises UserError."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    say = Console(enabled=rank == 0).say
    facts = check(config, world_size=size) + check_method(config)
    if rank == 0:
        with _refusing_all_ranks(config, size=size):
            refuse_if_locked(config.run_dir, say=say)  # before data are prepared, which may take hours
    folder = resolve_model(config.model.path)
    tokenizer, notes = configured_tokenizer(config.model, folder)
    facts += listen_for_notices(config.preemption, stop, rank=rank, note=Console(enabled=True).note)
    resume_gc()
    train_set, eval_set, report = prepare_data(config, tokenizer, say=say)
    held_out = HeldOut.prepare(config, tokenizer, eval_set.store) if config.data.eval else None
    # output_dir stays untouched until every check that one process can make has passed
    log_file, store = _enter_output_dir(config, rank=rank, size=size, say=say)
    world, agreed = form_world(config, store, rank=rank, size=size)
    config = rows_after_shortage(config, world)
    free_memory()
    with explain_out_of_memory(config, world, flash=False):
        engine = build_engine(config, world, folder=folder, tokenizer=tokenizer)
        folder = local_folder(folder, config.model.revision)  # a hub id is in the cache once it is loaded
        samples = None if config.data.live else train_set.store
        checked = self_check(engine, config, folder=folder, tokenizer=tokenizer, samples=samples)
    report["estimated_steps"] = estimated_steps(config, train_set, packs=checked.packs)
    stream = open_stream(config, tokenizer, train_set, packing=checked.packs)
    run = Run(config, world, engine, stream, stop, tokenizer=tokenizer, held_out=held_out, folder=folder)
    run.recorder.watch(log_file)
    parts = other_parts(engine, folder)
    facts = [*facts, *parts, *notes, *report_lines(report), *agreed, *checked.lines]
    run.start(facts=facts, data_report=report)
    return run


def _enter_output_dir(
    config: RunConfig, *, rank: int, size: int, say: Callable[[str], None]
) -> tuple[AppendedFile, dist.Store]:
    """Lock output_dir and begin this rank's log in it; all ranks raise ConfigError if another run holds the lock."""
    if rank == 0:
        with _refusing_all_ranks(config, size=size):
            lock_folder(config.run_dir, say=say)
        log_file, store = log_rank_output(config, rank=rank), meet(config)
    else:
        store = meet(config)
    refusal = share_refusal(store, "", rank=rank, size=size, timeout_s=config.collective_timeout_s)
    if refusal:
        raise ConfigError(refusal)
    return log_file if rank == 0 else log_rank_output(config, rank=rank), store


@contextmanager
def _refusing_all_ranks(config: RunConfig, *, size: int) -> Iterator[None]:
    """On rank 0: a ConfigError inside also reaches the other ranks, in `_enter_output_dir`."""
    try:
        yield
    except ConfigError as error:
        if size > 1:
            share_refusal(meet(config), str(error), rank=0, size=size, timeout_s=config.collective_timeout_s)
        raise
