"""Explains running out of memory: planned against measured memory, and what to change.

With batch.halve_when_out_of_memory the next start uses half the rows per micro-batch: the number is stored in the run
folder, and the agent restarts the run immediately. Global batch and samples stay the same.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from pydantic import PositiveInt

from ft_dist.config.schema import RunConfig
from ft_dist.distributed import World, max_over_ranks
from ft_dist.errors import ConfigError, ModelError, TrainingError
from ft_dist.observe.files import write_json
from ft_dist.outside import Document, parse_document
from ft_dist.plan.fit import Place, fit
from ft_dist.plan.gpu import free_host_memory, gpu_like
from ft_dist.plan.guard import changes
from ft_dist.plan.job import job_of
from ft_dist.plan.memory.total import memory_plan
from ft_dist.resources import is_out_of_memory
from ft_dist.run_folder import RunFolder


def rows_after_shortage(config: RunConfig, world: World) -> RunConfig:
    """The config with the micro-batch that an earlier start of this run halved. All ranks call it."""
    path = RunFolder(config.run_dir).micro_rows
    rows = config.batch.micro_rows
    if config.batch.halve_when_out_of_memory:
        rows = min(rows, _stored_rows(path) or rows)
    # the minimum over ranks: a node may not see rank 0's disk
    rows = int(-max_over_ranks(-float(rows), world)) if config.batch.halve_when_out_of_memory else rows
    return config.model_copy(update={"batch": config.batch.model_copy(update={"micro_rows": rows})})


class StoredRows(Document):
    """The content of micro_rows.json."""

    micro_rows: PositiveInt


def _stored_rows(path: Path) -> int | None:
    """None without the file, or if it cannot be read or is damaged: running out of memory writes it again."""
    with suppress(OSError, ConfigError):
        return parse_document(path.read_bytes(), StoredRows, where=path, error=ConfigError).micro_rows
    return None


@contextmanager
def explain_out_of_memory(config: RunConfig, world: World, *, flash: bool) -> Iterator[None]:
    """Turns an out-of-memory error inside into the error of `shortage`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise shortage(config, world, error, flash=flash) from error


def shortage(config: RunConfig, world: World, error: BaseException, *, flash: bool) -> ConfigError | TrainingError:
    """The error that ends the run. TrainingError if the next start uses smaller micro-batches, else ConfigError."""
    rows = config.batch.micro_rows
    problem = (
        f"out of memory at batch.micro_rows={rows}, data.max_length={config.data.max_length}. {_numbers(world, error)}"
    )
    if config.batch.halve_when_out_of_memory and rows > 1:
        path = RunFolder(config.run_dir).micro_rows
        try:
            write_json(path, StoredRows(micro_rows=rows // 2).model_dump())
        except OSError as refused:
            return ConfigError(
                f"{problem} {path}: cannot be written ({refused.strerror}), so the next start would use as many rows. "
                f"Set batch.micro_rows={rows // 2}: global batch and samples stay the same."
            )
        return TrainingError(
            f"{problem} batch.halve_when_out_of_memory: the next start resumes from the last commit with "
            f"batch.micro_rows={rows // 2}, the same global batch and the same samples."
        )
    return ConfigError(f"{problem} {_advice(config, world, flash)} (ft-dist plan shows the parts)")


def _numbers(world: World, error: BaseException) -> str:
    first = (str(error).strip().splitlines() or ["no reason given"])[0]
    if world.device.type != "cuda":
        free = free_host_memory()
        return (
            f"The allocator reports: {first[:200]}" + (f" ({free / 2**30:.1f} GiB are free here)" if free else "") + "."
        )
    free, total = torch.cuda.mem_get_info(world.device)
    held, reserved = torch.cuda.memory_allocated(world.device), torch.cuda.memory_reserved(world.device)
    peak = torch.cuda.max_memory_allocated(world.device)
    return (
        f"The allocator: {_gib(held)} in tensors now, {_gib(peak)} at most, {_gib(reserved)} reserved, {_gib(free)} of "
        f"{_gib(total)} free."
    )


def _advice(config: RunConfig, world: World, flash: bool) -> str:
    gpu = world.device.type == "cuda"
    try:
        job = job_of(config, ranks=world.size, ranks_per_node=world.local_size, gpu=gpu, flash=flash)
    except ModelError:
        return "Lower batch.micro_rows or data.max_length, or set engine.activation_checkpointing=true."
    memory = memory_plan(job)
    parts = sorted(memory.parts.items(), key=lambda item: -item[1])[:4]
    planned = f"Planned: {_gib(memory.peak)} ({', '.join(f'{part} {_gib(size)}' for part, size in parts)})."
    chip = gpu_like(torch.cuda.get_device_name(world.device)) if gpu else None
    host = (free_host_memory() or memory.peak) // world.local_size
    total = torch.cuda.mem_get_info(world.device)[1] if gpu else host
    # the plan was too low, or the machine has less memory than it reports: aim for 80% of the plan
    found = fit(job, Place(min(total, int(memory.peak * 0.8)), chip))
    if found is None:
        return f"{planned} Use more GPUs, a shorter data.max_length or a smaller model."
    return f"{planned} These settings need less: {changes(config, found)}."


def _gib(nbytes: float) -> str:
    return f"{nbytes / 2**30:.2f} GiB"
