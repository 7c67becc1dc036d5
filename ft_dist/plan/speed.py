"""Time of a step on GPUs: arithmetic, device memory traffic, and communication that is not hidden.

A step is its micro-batches and one update. The time of a micro-batch is the sum of its matrix products, its attention
and memory-bound work (norms, activations, rotary embedding, loss), each at a share of the GPU's best rate, and of the
collectives, of which ZeRO-3's overlap with arithmetic. One set of shares serves all models, methods and GPUs;
tests/plan/test_published.py compares them with published runs.

T tokens, H hidden, I intermediate, Q and K widths of queries and keys, P trained parameters, N ranks.
"""

from dataclasses import dataclass

from ft_dist.errors import UserError
from ft_dist.plan.gpu import Gpu
from ft_dist.plan.job import Job
from ft_dist.plan.memory.states import MAX_LIVE, fp8_matrices

MATMUL_SHARE = 0.69
"""Share of the best measured matrix product: for the shapes of layers, and clocks under sustained load"""
ATTENTION_SHARE = 1.0
"""Share of flash attention's published rate, which already holds for training shapes"""
MEMORY_SHARE = 0.80
"""Share of the data sheet's bandwidth that copies reach"""
LINK_SHARE = 0.80
"""Share of the links' bandwidth that NCCL's large collectives reach"""
HIDDEN_SHARE = 0.90
"""Share of arithmetic that can overlap with ZeRO-3's collectives"""
HOP_S = 5e-6
"""One step of a ring"""
LAUNCH_S = 4e-6
FUSED_LAUNCHES, PLAIN_LAUNCHES = 50, 330
"""Kernels of a block, forward and backward"""
UPDATE_LAUNCHES = {0: 20, 1: 20, 2: 50, 3: 45}
"""Kernels of an update by ZeRO stage, counted for 203 tensors; the number of AdamW's does not grow with them"""
CAT_TENSORS = 128
"""Small tensors that torch concatenates in one kernel"""
ROUNDS = 5
"""Newton-Schulz steps of Muon"""
OPTIMIZER_LAUNCHES = {"adamw": 0, "adamw_8bit": 38, "muon": 35}
"""Kernels per tensor of adapters or of a block"""
UPDATE_BYTES = {0: 40, 1: 42, 2: 58, 3: 50}
"""Bytes per parameter that a rank updates: norm (4), master, moments and gradients (28, and 4 to 24 to clip and gather
these), weights (6)"""
PCIE_BYTES_S, HOST_BYTES_S = 25e9, 15e9
"""Offload: bandwidth from one GPU to its host, and a GPU's share of the host's memory bandwidth during the update"""


@dataclass(frozen=True)
class StepPlan:
    """Seconds of a step by part, in order; tokens per second over all ranks."""

    parts: dict[str, float]
    seconds: float
    tokens_per_s: float
    tokens_per_s_gpu: float
    mfu: float


@dataclass(frozen=True)
class Links:
    """The links of collectives. `network` in bytes per second and GPU."""

    gpu: Gpu
    ranks: int
    per_node: int
    network: float

    def gather_s(self, nbytes: float, calls: float = 1, *, ranks: int | None = None) -> float:
        """An all-gather to, or a reduce-scatter from, `nbytes` on every rank: a ring within and between nodes."""
        ranks = self.ranks if ranks is None else ranks
        if ranks == 1:
            return 0.0
        nodes = -(-ranks // self.per_node)
        inside = nbytes * (ranks - 1) / ranks / self.gpu.link
        between = nbytes * (nodes - 1) / nodes / self.per_node / self.network if nodes > 1 else 0.0
        hops = min(ranks, self.per_node) - 1 + nodes - 1
        return max(inside, between) / LINK_SHARE + calls * hops * HOP_S


def step_plan(
    job: Job, gpu: Gpu, *, network: float | None = None, zeropp: bool = False, recomputed: float | None = None
) -> StepPlan:
    """`zeropp`: ZeRO++ (arXiv 2306.10209): gathers in 8 bits and within the node for backward, gradients in 4 bits.

    `recomputed` is the share of a block's forward matrix products that backward repeats, if that is neither none
    nor all of them (selective checkpointing, of other trainers).
    """
    links = Links(gpu, job.ranks, min(job.ranks_per_node, job.ranks), network or gpu.network)
    again = (1.0 if job.checkpointing else 0.0) if recomputed is None else recomputed
    counts = job.micro_batches
    rate = gpu.matmul if job.item == 2 else gpu.fp32
    fp8 = fp8_flops(job, again)
    matmul = (matmul_flops(job, again) - fp8) / (rate * MATMUL_SHARE)
    if fp8:
        matmul += fp8 / (fp8_rate(gpu) * MATMUL_SHARE)
    attention = attention_flops(job, 1.0 if recomputed is None and job.checkpointing else 0.0)
    attention /= (gpu.attention if job.item == 2 else gpu.fp32) * ATTENTION_SHARE
    moved = (moved_bytes(job, again) + fp8_bytes(job, again)) / (gpu.bandwidth * MEMORY_SHARE)
    launches = (FUSED_LAUNCHES if job.fused else PLAIN_LAUNCHES) * (1 + again / 3) * job.shape.layers * LAUNCH_S
    compute = max(matmul + attention + moved, launches)
    each, once = collectives(job, links, zeropp=zeropp)
    if job.stage == 3:
        # the first block's weights and the last one's gradients have nothing to overlap with
        each = max(each - compute * HIDDEN_SHARE, each / job.shape.layers)
    parts = {
        "matrix products": counts * matmul,
        "attention": counts * attention,
        "memory-bound": counts * (compute - matmul - attention),
        "communication": counts * each + once,
        "update": update_s(job, gpu),
    }
    seconds = sum(parts.values())
    tokens_per_s = job.step_tokens / seconds
    model_flops = counts * (matmul_flops(job, 0.0) + attention_flops(job, 0.0))
    return StepPlan(parts, seconds, tokens_per_s, tokens_per_s / job.ranks, model_flops / seconds / gpu.flops)


def matmul_flops(job: Job, recomputed: float) -> float:
    """FLOPs of a rank's micro-batch: 2 forward, 2 for gradients of activations, 2 for those of trained parameters."""
    shape, tokens = job.shape, job.tokens
    blocks, head = shape.block_matrices * shape.layers, shape.vocabulary * shape.hidden
    per_token = blocks * (4 + 2 * recomputed) + job.labelled * head * 4
    if job.frozen_base:
        per_token += job.trainable * (6 + 2 * recomputed)
    else:
        per_token += 2 * blocks + 2 * job.labelled * head
    return tokens * per_token


def fp8_flops(job: Job, recomputed: float) -> float:
    """The part of these with FP8 weights."""
    return job.tokens * sum(matrix.numel for matrix in fp8_matrices(job)) * (4 + 2 * recomputed)


def fp8_bytes(job: Job, recomputed: float) -> float:
    """Quantising X and dY reads 2 bytes and writes 1 per element; the sum of dX and its low-rank part moves 2 more."""
    shape = job.shape
    if not fp8_matrices(job):
        return 0.0
    ins = 2 * shape.hidden + shape.q_width + shape.intermediate
    outs = shape.q_width + 2 * shape.kv_width + 2 * shape.hidden + 2 * shape.intermediate
    return job.tokens * shape.layers * (3 * ins * (1 + recomputed) + 3 * outs + 2 * ins * job.item)


def fp8_rate(gpu: Gpu) -> float:
    """Raises UserError for a GPU without FP8."""
    if gpu.fp8 is None:
        raise UserError(f"model.base_dtype=fp8: {gpu.name} does not multiply in FP8. Remove the key for this GPU.")
    return gpu.fp8


def attention_flops(job: Job, recomputed: float) -> float:
    """Causal: half of the square. 4 T S Q forward, 2.5 times that backward (FlashAttention-2); a mask costs all of
    the square."""
    shape = job.shape
    forward = 4 * job.tokens * job.length * shape.q_width * shape.layers * (1.0 if job.masked else 0.5)
    return forward * (3.5 + recomputed)


def moved_bytes(job: Job, recomputed: float) -> float:
    """Bytes that element-wise ops read and write, counted from the ops of a block, in elements per token."""
    shape = job.shape
    h, i, q, k = shape.hidden, shape.intermediate, shape.q_width, shape.kv_width
    outs = sum(out for name, out, _ in shape.linears() if name in job.adapted_names)
    ins = sum(width for name, _, width in shape.linears() if name in job.adapted_names)
    norms = shape.form.block_norms
    if job.fused:
        # one residual addition in a norm, one separate; in backward both in norms
        forward = 2 * norms * h + 5 * h + 4 * (q + k) + 3 * i + 2 * outs + ins
        backward = 3 * norms * h + 2 * h + 6 * (q + k) + 5 * i + 2 * outs + ins
        backward += 3 * i if job.remakes_product else 0
    else:
        forward = 17 * norms * h + 6 * h + 12 * (q + k) + 5 * i + 5 * outs + ins
        backward = 34 * norms * h + 6 * h + 14 * (q + k) + 9 * i + 2 * outs + 3 * ins
    blocks = job.tokens * shape.layers * (forward * (1 + recomputed) + backward) * job.item
    logits = job.tokens * job.labelled * shape.vocabulary * (3 * job.item if job.fused_head else 24)
    return blocks + logits


def collectives(job: Job, links: Links, *, zeropp: bool) -> tuple[float, float]:
    """Seconds of communication per micro-batch, and per step.

    Stages 0 and 1 reduce all gradients once per step, stage 2 in every micro-batch (its partitions accumulate the
    result); both use all-reduce, which is a reduce-scatter and an all-gather. Stage 3 gathers weights for forward and
    backward, unless its buffer of a billion elements keeps them, and reduce-scatters gradients.
    """
    if job.ranks == 1:
        return 0.0, 0.0
    b, trained = job.item, job.trainable
    gradients = 2 * links.gather_s(trained * b, calls=_buckets(trained))
    if job.stage == 0:
        return 0.0, gradients
    updated = links.gather_s(trained * b)
    if job.stage == 1:
        return 0.0, gradients * 4 / b + updated
    if job.stage == 2:
        return gradients, updated
    blocks = job.shape.layers
    weights = job.total * b
    again = max(0.0, 1 - MAX_LIVE / job.total)
    forward = links.gather_s(weights * (0.5 if zeropp else 1.0), calls=blocks)
    node = links.per_node if zeropp else None
    backward = links.gather_s(weights * again, calls=blocks, ranks=node)
    scattered = links.gather_s(trained * b * (0.25 if zeropp else 1.0), calls=_buckets(trained))
    return forward + backward + scattered, 0.0


def _buckets(trained: int) -> int:
    from ft_dist.engine.settings import reduce_bucket_elements

    return -(-trained // reduce_bucket_elements(trained))


def update_s(job: Job, gpu: Gpu) -> float:
    """Gradient accumulation and one update: bytes moved, and kernels too short to fill a GPU.

    With offload, gradients and weights cross PCIe and the host does the update.
    """
    own = job.trainable / (1 if job.stage == 0 else job.ranks)
    if job.offload:
        return own * (4 + job.item) / PCIE_BYTES_S + own * 32 / HOST_BYTES_S
    added_bytes, added_launches = _adding_up(job)
    moved = job.micro_batches * job.trainable * added_bytes + own * UPDATE_BYTES[job.stage]
    for_each = job.micro_batches * added_launches + OPTIMIZER_LAUNCHES[job.config.optim.kind] / job.ranks
    kernels = UPDATE_LAUNCHES[job.stage] + len(job.trained) * for_each
    orthogonal_s = orthogonal_flops(job) / (gpu.matmul * MATMUL_SHARE)
    return moved / (gpu.bandwidth * MEMORY_SHARE) + kernels * LAUNCH_S + orthogonal_s


def _adding_up(job: Job) -> tuple[float, float]:
    """Accumulation of a micro-batch's gradients: bytes per parameter, kernels per tensor."""
    if job.gradients_at_once:  # concatenated, 2 + 2 bytes, then added, 2 + 4 + 4
        return 14.0, 1 / CAT_TENSORS
    if job.stage < 2:
        return (12.0 if job.item == 4 else 10.0), 1.0
    # copied into a bucket, 2 + 2; a rank's own part is widened, 2 + 4, and added, 4 + 4 + 4
    return 4 + 18 / job.ranks, 4.0


def orthogonal_flops(job: Job) -> float:
    """Muon: five rounds of three products per matrix of a block, distributed over ranks."""
    if job.config.optim.kind != "muon":
        return 0.0
    sides = [sorted(p.shape) for p in job.trained if len(p.shape) == 2 and p.layer is not None]
    return sum(ROUNDS * (4 * small**2 * large + 2 * small**3) for small, large in sides) / job.ranks
