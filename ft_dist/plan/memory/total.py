"""Peak memory of a rank in a simulated step: the peak, its parts, and its moment."""

from dataclasses import dataclass, replace

from ft_dist.config.schema import RunConfig
from ft_dist.plan.job import Job
from ft_dist.plan.memory.activations import RECOMPUTED, Walk
from ft_dist.plan.memory.ledger import Ledger
from ft_dist.plan.memory.states import States, moment_bytes

CONTEXT, MARGIN = "CUDA and NCCL context", "fragmentation margin"
CONTEXT_BYTES = 1_000_000_000
"""A CUDA context with the kernels of torch's libraries, and NCCL's channel buffers"""
PROCESS, SNAPSHOT = "Python and its libraries", "copy for commits"
PROCESS_BYTES = 700_000_000
"""Resident memory of a rank without a model: torch, DeepSpeed, transformers"""
MARGIN_SHARE = 0.05
"""Share of the allocator's memory in freed blocks that no request fits"""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one rank. `tensors` is what torch's allocator counts at the peak; `peak` adds context and margin.

    `block_kept` is what a block keeps for its backward pass, without and with checkpointing. `host` is the rank's share
    of host memory: offloaded state, and the copy from which a commit is written.
    """

    tensors: int
    parts: dict[str, int]
    moment: str
    timeline: list[tuple[str, int]]
    host: int
    peak: int
    block_kept: int
    block_kept_checkpointed: int


def memory_plan(job: Job) -> MemoryPlan:
    ledger = Ledger()
    walk_step(job, ledger)
    parts = {part: nbytes for part, nbytes in ledger.peak_parts.items() if nbytes}
    peak = ledger.peak_bytes
    if job.gpu:
        parts |= {CONTEXT: CONTEXT_BYTES, MARGIN: int(MARGIN_SHARE * peak)}
        peak += parts[CONTEXT] + parts[MARGIN]
    else:
        # host memory holds all of it
        parts |= {PROCESS: PROCESS_BYTES, SNAPSHOT: snapshot_bytes(job)}
        peak += parts[PROCESS] + parts[SNAPSHOT]
    return MemoryPlan(
        tensors=ledger.peak_bytes,
        parts=parts,
        moment=ledger.peak_moment,
        timeline=ledger.timeline,
        host=host_bytes(job),
        peak=peak,
        block_kept=kept_by_block(job),
        block_kept_checkpointed=job.tokens * job.shape.hidden * job.item,
    )


def kept_by_block(job: Job) -> int:
    """Bytes that a block past the first keeps for its backward pass without checkpointing."""
    ledger = Ledger()
    walk = Walk(replace(job, config=unchecked(job)), ledger)
    walk.forward_block(1)
    return ledger.total


def unchecked(job: Job) -> RunConfig:
    engine = job.config.engine.model_copy(update={"activation_checkpointing": False})
    return job.config.model_copy(update={"engine": engine})


def walk_step(job: Job, ledger: Ledger) -> None:
    """A step after the first, with the optimizer's state allocated. Of equal micro-batches only the first and the last
    are simulated."""
    ledger.at("between steps")
    states = States(job, ledger)
    first, last = 1, job.micro_batches
    for index in sorted({first, last}):
        micro_batch(job, ledger, states, last=index == last)
    ledger.at("update")
    states.update()


def micro_batch(job: Job, ledger: Ledger, states: States, *, last: bool) -> None:
    walk, layers = Walk(job, ledger), job.shape.layers
    ledger.at("forward")
    states.forward_gathers()
    walk.forward_start()
    for layer in range(layers):
        ledger.at(f"forward of block {layer + 1}")
        walk.forward_block(layer)
        if job.checkpointing:
            walk.release_block(layer)
    walk.forward_end()
    ledger.at("loss")
    walk.loss()
    walk.loss_backward()
    if job.trains_head and (job.frozen_base or not job.shape.tied):
        states(job.shape.vocabulary * job.shape.hidden)
        ledger.free("d_head")
    for layer in reversed(range(layers)):
        ledger.at(f"backward of block {layer + 1}")
        if job.checkpointing:
            walk.part = RECOMPUTED
            walk.forward_block(layer)
            ledger.free(f"x{layer + 1}")
        walk.backward_block(layer, states)
    ledger.at("backward of the embedding")
    if not job.frozen_base:
        embedding = job.shape.vocabulary * job.shape.hidden
        ledger.spike("gradients", embedding * job.item)
        ledger.free("d_head")
        states(embedding)
    walk.backward_end()
    states.micro_batch_ends(last=last)


def snapshot_bytes(job: Job) -> int:
    """The host's copy of a rank's state, from which a commit is written; its moments are fp32."""
    own = -(-job.trainable // job.ranks)
    return int(own * 4 + (moment_bytes(job, own) if job.config.optim.kind == "muon" else own * 8))


def host_bytes(job: Job) -> int:
    """Host bytes of one rank: the copy for commits, and offloaded state."""
    own = -(-job.trainable // job.ranks)
    offloaded = moment_bytes(job, own) + own * (8 + job.item) if job.config.engine.offload == "cpu" else 0
    return int(snapshot_bytes(job) + offloaded)
