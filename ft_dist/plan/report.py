"""`ft-dist plan`: the plan of a run as a tree for scripts and as text."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ft_dist.config.schema import RunConfig
from ft_dist.errors import ConfigError, counted
from ft_dist.plan.cost import run_plan, spot_plan
from ft_dist.plan.fit import Place, fit, more_ranks, with_settings, write_recipe
from ft_dist.plan.gpu import Gpu, device_here, gpu_like, gpu_named
from ft_dist.plan.job import Job, flash_here, job_of
from ft_dist.plan.memory.total import MemoryPlan, memory_plan
from ft_dist.plan.speed import step_plan


@dataclass(frozen=True)
class Cluster:
    """The cluster of a plan. `price` per GPU hour; `preemptions` per node and day; `network` in bytes per second and
    GPU, None for the table's value; `tokens` per epoch, None to estimate them."""

    gpu: str = "h100"
    nodes: int = 1
    gpus_per_node: int | None = None
    price: float | None = None
    preemptions: float | None = None
    network: float | None = None
    tokens: int | None = None

    @property
    def chip(self) -> Gpu:
        return gpu_named(self.gpu)

    @property
    def per_node(self) -> int:
        return self.gpus_per_node or self.chip.per_node

    @property
    def ranks(self) -> int:
        return self.nodes * self.per_node

    def job(self, config: RunConfig) -> Job:
        return job_of(config, ranks=self.ranks, ranks_per_node=self.per_node, gpu=True, flash=flash_here(config))


def gpu_here() -> str | None:
    """The table's name for this machine's GPU."""
    device = device_here(1)
    chip = gpu_like(device.name) if device and device.gpu else None
    return chip.key if chip else None


def fitted(config: RunConfig, cluster: Cluster, path: Path, *, recipe: str) -> RunConfig:
    """The config with the fastest setting that fits `cluster`, also written to `path`.

    Raises ConfigError if nothing fits.
    """
    job, chip = cluster.job(config), cluster.chip
    place = Place(chip.memory, chip, cluster.network)
    found = fit(job, place)
    if found is None:
        further = more_ranks(job, place)
        hint = f"Use {further[0]} GPUs" if further else "Use a smaller model or a shorter data.max_length"
        raise ConfigError(f"--fit: no setting fits {cluster.ranks} x {chip.name}. {hint}.")
    heading = (
        f"{recipe} for {cluster.ranks} x {chip.name}: {found.tokens_per_s:,.0f} tokens/s planned (ft-dist plan --fit)"
    )
    write_recipe(config, found, path, heading=heading)
    return with_settings(config, found.settings)


def plan_run(config: RunConfig, cluster: Cluster) -> dict[str, Any]:
    """Raises ModelError, UserError."""
    job, chip = cluster.job(config), cluster.chip
    memory = memory_plan(job)
    step = step_plan(job, chip, network=cluster.network)
    run = run_plan(job, step.seconds, tokens=cluster.tokens, price=cluster.price)
    spot = spot_plan(job, step.seconds, run, preemptions=cluster.preemptions) if cluster.preemptions else None
    return {
        "model": {
            "path": config.model.path,
            "family": job.shape.family,
            "known": job.shape.known,
            "parameters": job.shape.total_parameters,
            "trained": job.trainable,
            "method": config.method.kind,
        },
        "world": {
            "gpu": chip.name,
            "nodes": cluster.nodes,
            "gpus_per_node": cluster.per_node,
            "gpus": cluster.ranks,
            "zero_stage": job.stage,
            "micro_batches": job.micro_batches,
            "tokens_a_step": job.step_tokens,
            "attention_mask": job.masked,
        },
        "memory": memory_tree(memory, chip.memory),
        "step": asdict(step),
        "run": asdict(run) if run else None,
        "spot": asdict(spot) if spot else None,
    }


def memory_tree(memory: MemoryPlan, available: int) -> dict[str, Any]:
    return {
        "peak_bytes": memory.peak,
        "tensors_bytes": memory.tensors,
        "parts_bytes": memory.parts,
        "peak_at": memory.moment,
        "block_kept_bytes": memory.block_kept,
        "block_kept_checkpointed_bytes": memory.block_kept_checkpointed,
        "host_bytes": memory.host,
        "available_bytes": available,
        "fits": memory.peak <= available,
        "timeline": memory.timeline,
    }


def table(tree: dict[str, Any]) -> str:
    """The plan as text."""
    model, world, memory, step = tree["model"], tree["world"], tree["memory"], tree["step"]
    lines = [
        f"{model['path']}: {model['family']}, {model['parameters'] / 1e9:,.2f} B parameters, "
        f"{model['trained'] / 1e6:,.1f} M trained ({model['method']})",
        f"{world['gpus']} x {world['gpu']} on {counted(world['nodes'], 'node')}, "
        f"ZeRO {world['zero_stage']}, {world['micro_batches']} micro-batches per step of "
        f"{world['tokens_a_step']:,} tokens",
    ]
    if not model["known"]:
        lines.append(f"note: plan does not know the family {model['family']} and assumes Llama's layout")
    if world["attention_mask"]:
        lines.append("note: without flash attention, packed rows need a mask in every block (pip install flash-attn)")
    lines += ["", f"peak memory per GPU ({memory['peak_at']})"]
    for part, nbytes in sorted(memory["parts_bytes"].items(), key=lambda item: -item[1]):
        lines.append(f"  {part:28}{_gib(nbytes):>10}  {'#' * round(40 * nbytes / memory['peak_bytes'])}")
    verdict = "fits" if memory["fits"] else "DOES NOT FIT"
    lines += [
        f"  {'total':28}{_gib(memory['peak_bytes']):>10}  of {_gib(memory['available_bytes'])}: {verdict}",
        f"  a block keeps {_gib(memory['block_kept_bytes'])} for backward, "
        f"{_gib(memory['block_kept_checkpointed_bytes'])} with checkpointing",
        f"  host: {_gib(memory['host_bytes'])} per GPU for commits and offloaded state",
        "",
        f"a step takes {_time(step['seconds'])}: {step['tokens_per_s']:,.0f} tokens/s, "
        f"{step['tokens_per_s_gpu']:,.0f} per GPU, MFU {step['mfu']:.0%}",
    ]
    for part, seconds in step["parts"].items():
        lines.append(f"  {part:28}{_time(seconds):>10}  {'#' * round(40 * seconds / step['seconds'])}")
    return "\n".join([*lines, *_run_lines(tree["run"], tree["spot"])])


def _run_lines(run: dict[str, Any] | None, spot: dict[str, Any] | None) -> list[str]:
    if run is None:
        lines = ["", "the run's length is unknown: pass --tokens N (per epoch), or set optim.max_steps"]
    else:
        about = "about " if run["estimated"] else ""
        cost = "" if run["cost"] is None else f", ${run['cost']:,.2f}"
        steps, tokens = counted(run["steps"], "step"), f"{run['tokens'] / 1e6:,.1f} M tokens"
        lines = ["", f"the run: {about}{steps}, {tokens}, {_time(run['hours'] * 3600)}{cost}"]
    if spot:
        every = f"{counted(spot['best_interval_steps'], 'step')} ({_time(spot['best_interval_s'])}, Young/Daly)"
        lost = f"{spot['lost_share']:.1%} of the time is lost; {spot['lost_share_as_configured']:.1%} as configured"
        lines.append(f"a preemption every {_time(spot['mean_time_between_s'])}: commit every {every}, and {lost}")
        if spot["hours"] is not None:
            cost = "" if spot["cost"] is None else f", ${spot['cost']:,.2f}"
            lines.append(f"with preemptions the run takes {_time(spot['hours'] * 3600)}{cost}")
    return lines


def _gib(nbytes: float) -> str:
    return f"{nbytes / 2**30:,.2f} GiB" if nbytes >= 2**30 / 10 else f"{nbytes / 2**20:,.1f} MiB"


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:,.1f} ms"
    if seconds < 180:
        return f"{seconds:,.2f} s"
    return f"{seconds / 60:,.1f} min" if seconds < 3 * 3600 else f"{seconds / 3600:,.1f} h"
