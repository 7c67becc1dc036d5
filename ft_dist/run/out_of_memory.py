"""A run that runs out of memory: what was planned beside what the allocator says, and what to change.

With batch.halve_when_out_of_memory the run goes on with half the rows a micro-batch: the number is left in the run
folder, and the next start, which the agent makes at once, takes it. Global batch and samples stay the same.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ft_dist.config.schema import RunConfig
from ft_dist.distributed import World, max_over_ranks
from ft_dist.errors import ConfigError, ModelError, TrainingError
from ft_dist.observe.files import write_json
from ft_dist.plan.fit import Place, fit
from ft_dist.plan.gpu import free_host_memory, gpu_like
from ft_dist.plan.guard import changes
from ft_dist.plan.job import job_of
from ft_dist.plan.memory.total import memory_plan

SMALLER = "micro_rows.json"


def is_out_of_memory(error: BaseException) -> bool:
    """torch's own error on GPUs; on CPU its allocator raises a plain RuntimeError, and Python MemoryError."""
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)


def rows_after_shortage(config: RunConfig, world: World) -> RunConfig:
    """The config with the micro-batch that an earlier start of this run was left with. All ranks call it."""
    path = config.run_dir / SMALLER
    rows = config.batch.micro_rows
    if config.batch.halve_when_out_of_memory and path.exists():
        rows = min(rows, int(json.loads(path.read_text())["micro_rows"]))
    # a node that does not see rank 0's disk goes by the others
    rows = int(-max_over_ranks(-float(rows), world)) if config.batch.halve_when_out_of_memory else rows
    return config.model_copy(update={"batch": config.batch.model_copy(update={"micro_rows": rows})})


@contextmanager
def telling_shortage(config: RunConfig, world: World, *, flash: bool) -> Iterator[None]:
    """Ends a run that runs out of memory inside with what `shortage` says."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise shortage(config, world, error, flash=flash) from error


def shortage(config: RunConfig, world: World, error: BaseException, *, flash: bool) -> ConfigError | TrainingError:
    """The error to end the run with. TrainingError where another start goes on with smaller micro-batches."""
    rows = config.batch.micro_rows
    told = (
        f"out of memory at batch.micro_rows={rows}, data.max_length={config.data.max_length}. {_numbers(world, error)}"
    )
    if config.batch.halve_when_out_of_memory and rows > 1:
        write_json(config.run_dir / SMALLER, {"micro_rows": rows // 2})
        return TrainingError(
            f"{told} batch.halve_when_out_of_memory: the next start goes on from the last commit with "
            f"batch.micro_rows={rows // 2}, the same global batch and the same samples."
        )
    return ConfigError(f"{told} {_advice(config, world, flash)} (ft-dist plan shows the parts)")


def _numbers(world: World, error: BaseException) -> str:
    first = (str(error).strip().splitlines() or ["no reason given"])[0]
    if world.device.type != "cuda":
        free = free_host_memory()
        return f"The allocator says: {first[:200]}" + (f" ({free / 2**30:.1f} GiB are free here)" if free else "") + "."
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
    # what was planned has just been seen to be too little, or the machine to have less than it says
    found = fit(job, Place(min(total, int(memory.peak * 0.8)), chip))
    if found is None:
        return f"{planned} Take more GPUs, a shorter data.max_length or a smaller model."
    return f"{planned} This takes less: {changes(config, found)}."


def _gib(nbytes: float) -> str:
    return f"{nbytes / 2**30:.2f} GiB"
