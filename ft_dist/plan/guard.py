"""Refuses a run that cannot fit before it starts, and names the nearest setting that fits."""

from ft_dist.config.schema import RunConfig
from ft_dist.errors import MemoryPlanError, ModelError
from ft_dist.plan.fit import KEYS, Fit, Place, fit, more_ranks, settings_of
from ft_dist.plan.gpu import Device, device_here, gpu_like
from ft_dist.plan.job import Job, flash_here, job_of
from ft_dist.plan.memory.total import MARGIN, memory_plan


def check_fits(config: RunConfig, *, ranks: int, ranks_per_node: int, device: Device | None) -> str | None:
    """Raise MemoryPlanError for a run that cannot fit `device`; otherwise return a line with the planned memory, or
    None if the device or the model is unknown.

    The fragmentation margin, which may turn out smaller, does not count against a run. On CPU only tensors count.
    """
    if device is None:
        return None
    try:
        job = job_of(config, ranks=ranks, ranks_per_node=ranks_per_node, gpu=device.gpu, flash=flash_here(config))
    except ModelError:
        return None  # the model's own checks report this better
    memory = memory_plan(job)
    least = memory.peak - memory.parts.get(MARGIN, 0) if device.gpu else memory.tensors
    need, have = f"{memory.peak / 2**30:.1f} GiB", f"{device.memory / 2**30:.1f} GiB"
    if least <= device.memory:
        tight = "" if memory.peak <= device.memory else "; that is tight"
        return f"memory: {need} of {have} per rank planned ({device.name}){tight}"
    raise MemoryPlanError(
        f"this run needs about {need} per rank ({memory.moment}), and {device.name} has {have}. "
        f"{_nearest(job, device)} (ft-dist plan shows the parts; --force starts it anyway)",
        short=f"not started: {need} of {have} per rank planned",
    )


def check_fits_here(config: RunConfig, *, ranks: int, ranks_per_node: int) -> str | None:
    """The same for the GPUs of this machine, or its free memory without a GPU."""
    return check_fits(config, ranks=ranks, ranks_per_node=ranks_per_node, device=device_here(ranks_per_node))


def device_called(name: str | None) -> Device | None:
    """The GPU that a cluster's profile names, if it is in the table."""
    chip = gpu_like(name) if name else None
    return Device(chip.name, chip.memory, gpu=True) if chip else None


def _nearest(job: Job, device: Device) -> str:
    place = Place(device.memory, gpu_like(device.name) if device.gpu else None)
    found = fit(job, place)
    if found:
        return f"This fits: {changes(job.config, found)}."
    further = more_ranks(job, place)
    if further:
        ranks, found = further
        return f"It needs {ranks} such devices: {changes(job.config, found)}."
    shorter = "Use a smaller model, a shorter data.max_length" + ("" if job.frozen_base else ", or method.kind=lora")
    return f"No setting of ZeRO stage, offload, checkpointing or micro-batch fits. {shorter}."


def changes(config: RunConfig, found: Fit) -> str:
    """As overrides for the command line, only what differs."""
    now = settings_of(config)
    differ = [key for key in KEYS if found.settings[key] != now[key]]
    text = " ".join(f"{key}={str(found.settings[key]).lower()}" for key in differ) or "the current settings"
    return f"{text} ({found.peak_bytes / 2**30:.1f} GiB)"
