"""What ZeRO keeps in addition to activations, by stage: weights, fp32 master, optimizer state, gradients, buffers.

Taken from DeepSpeed 0.19 (`runtime/zero/stage_1_and_2.py`, `stage3.py`, `runtime/bf16_optimizer.py`) and compared with
the tensors of real runs (tests/plan/test_measured.py). Stage 1 in bf16 holds a micro-batch's gradients until all are
computed, or one at a time if there are many (engine/flat_update.py). P parameters are trained, p = P / ranks.

    stage       weights      gradients                                      state
    0 (fp32)    4 P          4 P                                            moments of P
    1 (bf16)    2 P          2 P and a piece, or one, and 4 P to add up in  4 p + moments of p
    1 (fp32)    4 P          4 P                                            4 p + moments of p
    2           2 P          a bucket, 4 p to add up in                     4 p + moments of p
    3           2 p          a bucket, 4 p to add up in                     4 p + moments of p

Source: Rajbhandari et al., ZeRO (arXiv 1910.02054).
"""

from ft_dist.engine.settings import PIECE_ELEMENTS, reduce_bucket_elements
from ft_dist.model.shape import Parameter
from ft_dist.plan.job import Job
from ft_dist.plan.memory.activations import Gradient
from ft_dist.plan.memory.ledger import Ledger

WEIGHTS, MASTER, MOMENTS, ADAPTERS = "weights", "fp32 master", "optimizer state", "adapters"
GRADIENTS, SUMS, BUCKETS, GATHERED = "gradients", "fp32 sums of gradients", "ZeRO buckets", "ZeRO-3 gathered"
# DeepSpeed's defaults for stage 3
MAX_LIVE, PERSISTENT, PREFETCH = 1_000_000_000, 100_000, 50_000_000
SUB_GROUP = 1_000_000_000
ALLREDUCE_ELEMENTS = 500_000_000
FP8 = "fp8 copies"


def fp8_matrices(job: Job) -> list[Parameter]:
    """The linear layers that `model.base_dtype: fp8` keeps in e4m3 (ft_dist/model/fp8.py)."""
    if job.config.model.base_dtype != "fp8":
        return []
    return [p for p in job.shape.parameters if p.linear and all(side % 16 == 0 for side in p.shape)]


def frozen_bytes(job: Job) -> float:
    """Bytes of the frozen base. In FP8, both orientations take 2 bytes per element plus a scale per row, or 4 on
    CPU."""
    matrices = fp8_matrices(job)
    held = sum(matrix.numel for matrix in matrices)
    scales = 4 * sum(sum(matrix.shape) for matrix in matrices)
    rest = (job.total - job.trainable + job.spare_columns - held) * job.item / (job.ranks if job.stage == 3 else 1)
    return rest + held * (2 if job.gpu else 4) + scales


def fp8_copies(job: Job) -> float:
    """Temporary memory of the largest FP8 product in backward: codes of dY and the product, which is added to dX.

    On CPU first the group's concatenated dY, scaled in fp32, and its codes; then the widened codes of dY and weights,
    and the product in fp32.
    """
    matrices = fp8_matrices(job)
    if not matrices:
        return 0
    largest = max(matrices, key=lambda matrix: matrix.numel)
    (out, width), shape = largest.shape, job.shape
    gated, hidden = 2 * shape.intermediate, shape.hidden
    codes, product = job.tokens * max(out, gated), job.tokens * max(width, hidden) * job.item
    if job.gpu:
        return codes + product
    weights = gated * hidden * 4 if job.item == 4 else 0
    return max(codes * (job.item + 4 + 1), codes * (1 + job.item) + 3 * product + weights)


def moment_bytes(job: Job, numel: float) -> float:
    """Optimizer state of `numel` trained elements."""
    kind = job.config.optim.kind
    if kind == "adamw_8bit":
        return numel * 2 * (1 + 4 / 256)
    if kind == "muon":
        inside = [p for p in job.trained if len(p.shape) == 2 and (p.layer is not None)]
        share = sum(p.numel for p in inside) / job.trainable
        return numel * (4 * share + 8 * (1 - share))
    return numel * 8


class States(Gradient):
    """The engine's memory in a step on a ledger. The optimizer state exists, as it does after the first step."""

    def __init__(self, job: Job, ledger: Ledger) -> None:
        self.job, self.ledger = job, ledger
        self.own = -(-job.trainable // job.ranks) if job.stage > 0 else job.trainable
        weights = frozen_bytes(job) if job.frozen_base else 0
        self.fp8_copies = fp8_copies(job)
        # peft creates adapters in fp32, and only ZeRO-3 keeps them so
        trained = self.own * (4 if job.frozen_base else job.item) if job.stage == 3 else job.trainable * job.item
        ledger.hold(WEIGHTS, "frozen", weights)
        ledger.hold(ADAPTERS if job.frozen_base else WEIGHTS, "trained", trained)
        self.bucket = reduce_bucket_elements(job.trainable) * job.item
        if not job.offload:
            if job.stage > 0:
                ledger.hold(MASTER, "master", self.own * 4)
            ledger.hold(MOMENTS, "moments", moment_bytes(job, self.own))
        self.low = job.item == 2
        if job.stage == 1 and self.low:
            ledger.hold(SUMS, "sum", job.trainable * 4)
        if job.stage == 3:
            ledger.hold(SUMS, "sum", 0 if job.offload else self.own * 4)
            ledger.hold(BUCKETS, "bucket", self.bucket)
        self.waiting = 0

    def __call__(self, numel: int) -> None:
        """A gradient of `numel` elements was computed; the activations around it still exist."""
        job, ledger, nbytes = self.job, self.ledger, numel * self.job.item
        if self.fp8_copies:
            ledger.spike(FP8, self.fp8_copies)
        if job.stage == 1 and self.low and not job.gradients_at_once:
            ledger.spike(GRADIENTS, nbytes)
            return
        if job.stage <= 1:
            if job.stage == 1 and not self.low and "bucket" not in ledger.live:
                ledger.hold(BUCKETS, "bucket", self.bucket)
            if ledger.live.get("grads", ("", 0))[1] < job.trainable * job.item:
                ledger.hold(GRADIENTS, "grads", nbytes)
            else:
                ledger.spike(GRADIENTS, nbytes)
            return
        if job.stage == 2 and "bucket" not in ledger.live:
            ledger.hold(BUCKETS, "bucket", self.bucket)
        ledger.spike(GRADIENTS, nbytes)
        if self.waiting + nbytes > self.bucket:
            self._reduce()
        self.waiting += nbytes

    def _reduce(self) -> None:
        job, ledger, size = self.job, self.ledger, self.waiting
        if not size:
            return
        if job.stage == 2 and "sum" not in ledger.live and not job.offload:
            ledger.hold(SUMS, "sum", self.own * 4)
        ledger.spike(BUCKETS, size)
        self.waiting = 0

    def forward_gathers(self) -> None:
        """Stage 3: weights that stay gathered during use, and until the buffer of a billion elements is full."""
        job = self.job
        if job.stage == 3 and job.ranks > 1:
            self.ledger.hold(GATHERED, "gathered", min(job.total, MAX_LIVE + PREFETCH) * job.item)

    def micro_batch_ends(self, *, last: bool) -> None:
        job, ledger = self.job, self.ledger
        if job.stage >= 2:
            self._reduce()
        if job.gradients_at_once:
            ledger.spike(GRADIENTS, min(job.trainable, PIECE_ELEMENTS) * job.item)
            ledger.free("grads")
        if job.stage == 1 and not self.low and last and not job.offload:
            # gradients are reduced through the bucket, and this rank's part is kept separately
            ledger.free("grads")
            ledger.hold(SUMS, "new", self.own * 4)
        if job.stage == 0 and last and job.ranks > 1:
            # the all-reduce of DeepSpeed's plain engine flattens gradients
            ledger.spike(BUCKETS, min(job.trainable, ALLREDUCE_ELEMENTS) * job.item)
        if last:
            ledger.free("bucket" if job.stage < 3 else "")
        if job.stage == 2:
            if not self.low and not job.offload:
                ledger.hold(SUMS, "new", self.own * 4)
                if not last:
                    ledger.free("new")
            ledger.free("bucket")
        ledger.free("gathered")

    def update(self) -> None:
        job, ledger = self.job, self.ledger
        if job.stage == 3 and not job.offload:
            ledger.spike(SUMS, min(self.own, SUB_GROUP) * 4)
        if job.stage == 2 and not self.low and not job.offload:
            ledger.spike(SUMS, self.own * 4)
        if job.stage == 1 and not self.low:
            ledger.spike(SUMS, self.own * 4)
        ledger.free("grads", "new")
        if job.stage == 2:
            ledger.free("sum")
