"""One optimizer step over micro-batches, the same for every ZeRO stage.

The summed loss of a micro-batch is divided by the weight of the global batch (labelled tokens, for causal training)
before backward, and multiplied by the number of data-parallel ranks where DeepSpeed averages gradients over them. The
optimizer thus receives the gradient of sum(loss) / sum(weight), no matter how the batch is split.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ft_dist.config.schema import RunConfig
from ft_dist.data.stream.batch import MicroBatch
from ft_dist.distributed import World, sum_over_ranks
from ft_dist.engine.flat_update import FlatUpdate
from ft_dist.engine.grad_norm import judge_by_norm
from ft_dist.engine.replicas import verify_replicas
from ft_dist.engine.settings import deepspeed_config, effective_stage
from ft_dist.model.fp8 import held_elements
from ft_dist.model.fused.fuse import FusedReport
from ft_dist.model.parts.trained import TrainedParts
from ft_dist.objective.protocol import Objective
from ft_dist.optim.build import build_optimizer, parameter_groups


class StepSums(NamedTuple):
    """What each rank reports with a step, and what the step sums over all ranks."""

    stop_wanted: float = 0.0
    padded_tokens: float = 0.0
    computed_tokens: float = 0.0


@dataclass(frozen=True)
class StepResult:
    """The outcome of one step. `loss` is the mean over the objective's units; `skipped`: no weight changed.

    `sums` are the callers' numbers summed over all ranks. `abandoned`: a rank had no data, so no update ran.
    `before_update` took `held_up_s` of the step.
    """

    loss: float
    grad_norm: float
    skipped: bool
    sums: StepSums
    abandoned: bool = False
    held_up_s: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    """The objective's, as means over the same units"""


class Engine:
    """DeepSpeed around the objective: `train_step` in, `StepResult` out."""

    def __init__(
        self,
        objective: Objective,
        config: RunConfig,
        world: World,
        *,
        fused: FusedReport | None = None,
        trains: bool = True,
    ) -> None:
        """Without `trains` it has no optimizer, nor its memory, and can only compute losses."""
        import deepspeed

        self.config = config
        self.world = world
        stage = stage_of(objective.model, config, world)
        # without an optimizer, the lower stages have nothing to shard, and DeepSpeed refuses them
        self.stage = stage if trains or stage == 3 else 0
        self.objective = objective
        self.fused = fused or FusedReport("off")
        self.kernels = ""
        self.samples_alone = False
        """A sample's loss depends on the longest sample of its micro-batch, so that each needs its own"""
        self.notes: list[str] = []
        """Lines for the user on what was not loaded, and what the method leaves out"""
        self.parts = TrainedParts({}, {})
        """The shares of the model that train, by kind"""
        self.never_trained: list[nn.Parameter] = []
        """Parameters that the model's class freezes, and those of other parts of a multimodal model"""
        self._settled = world.device.type != "cuda"
        self.on_progress: Callable[[], None] = lambda: None
        """Called after every forward of a micro-batch and its backward, if any"""
        self.before_update: Callable[[], float] = lambda: 0.0
        """Called before weights and optimizer state change; returns the seconds by which it delayed the step"""
        self.on_phase: Callable[[str], AbstractContextManager[object]] = lambda phase: nullcontext()
        """Entered around each `forward`, `backward` and `optimizer` phase of a step, to time it"""
        # walking all modules takes milliseconds, and every save needs this
        self._trainable = [(name, p) for name, p in objective.model.named_parameters() if p.requires_grad]
        groups = parameter_groups(objective.model.named_parameters(), config.optim)
        self.deepspeed, *_ = deepspeed.initialize(
            model=objective,
            optimizer=build_optimizer(groups, config.optim) if trains else None,
            config=deepspeed_config(
                config, stage=self.stage, device_type=world.device.type, trainable=self.trainable_parameters
            ),
            dist_init_required=False,
        )
        self.flat: FlatUpdate | None = None
        if trains:
            self._prepare_updates()

    def _prepare_updates(self) -> None:
        """Replace the parts of DeepSpeed's update that we make ourselves."""
        config, world = self.config, self.world
        if self.stage == 1 and hasattr(self.deepspeed.optimizer, "bf16_groups"):
            self.flat = FlatUpdate(self.deepspeed.optimizer, world, max_grad_norm=config.optim.max_grad_norm)
        elif self.stage > 0 and config.engine.offload == "none":
            judge_by_norm(self.deepspeed.optimizer)
        if self.flat or (self.stage == 0 and world.size == 1):
            # DeepSpeed would flatten all gradients, reduce them even over one rank, and copy them back
            self.deepspeed.enable_backward_allreduce = False
        # some of DeepSpeed's optimizers take a trial step at the start, which would count as a step of Adam
        self.base_optimizer.state.clear()

    @property
    def base_optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer inside DeepSpeed's wrappers; its state is keyed by flat fp32 partitions."""
        return self.deepspeed.basic_optimizer if self.stage == 0 else self.deepspeed.optimizer.optimizer

    def train_step(
        self,
        micro_batches: Sequence[MicroBatch],
        *,
        weight: int,
        learning_rate: float,
        to_sum: Callable[[], StepSums] = StepSums,
        abandon: bool = False,
        verify_as: int | None = None,
    ) -> StepResult:
        """Forward and backward over this rank's micro-batches, then one update.

        `weight` is the objective's for the global batch. `to_sum` is called once this rank has queued its part; the
        hosts sum its numbers while the devices work, so a stop request reaches all ranks in the same step. `abandon` on
        any rank leaves all weights unchanged; gradients are then undefined, and the run must end. `verify_as`: the
        number of this step, if the ranks shall compare the weights that gave the gradients before these change any.

        Raises TrainingError on all ranks if their weights differ.
        """
        self.objective.train()
        scale = (1 if self.flat else self.world.data_size) / weight
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.world.device)
        metric_sums: dict[str, Tensor] = {}
        for index, batch in enumerate(micro_batches):
            self.deepspeed.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
            inputs = batch.to(self.world.device, non_blocking=True).inputs()
            with self.on_phase("forward"):
                loss = self.deepspeed(**inputs)
            loss_sum += loss.detach()
            for name, value in self.objective.metrics(batch).items():
                metric_sums[name] = metric_sums.get(name, 0) + value.detach().double()
            with self.on_phase("backward"):
                self.deepspeed.backward(loss * scale, scale_wrt_gas=False)
                if self.flat:
                    self.flat.add_gradients()
            self.on_progress()
        alone = self.world.size == 1
        abandoning, *sums = [float(abandon)] if alone else sum_over_ranks([float(abandon), *to_sum()], self.world)
        if abandoning:
            summed = to_sum() if alone else StepSums(*sums)
            return StepResult(loss=math.nan, grad_norm=math.nan, skipped=True, sums=summed, abandoned=True)
        if verify_as is not None:
            verify_replicas(self.objective, self.world, step=verify_as)
        held_up_s = self.before_update()
        with self.on_phase("optimizer"):
            total, norm = self._update(loss_sum, learning_rate)
        skipped = not math.isfinite(norm)
        if not self._settled:
            self._settle()
        return StepResult(
            loss=total / weight,
            grad_norm=math.nan if skipped else norm,
            skipped=skipped,
            # a single rank asks as late as possible, after the device has finished
            sums=to_sum() if alone else StepSums(*sums),
            held_up_s=held_up_s,
            metrics=self._mean(metric_sums, weight),
        )

    def _mean(self, sums: dict[str, Tensor], weight: int) -> dict[str, float]:
        if not sums:
            return {}
        stacked = torch.stack(list(sums.values()))
        if self.world.size > 1:
            dist.all_reduce(stacked)
        return dict(zip(sums, (stacked / weight).tolist(), strict=True))

    def _settle(self) -> None:
        """Release memory that only the first step used: weights move into merged buffers in its forward pass, and the
        allocator keeps their old blocks, in which nothing else fits."""
        torch.cuda.empty_cache()
        self._settled = True

    @torch.no_grad()
    def loss_sum(self, batch: MicroBatch) -> torch.Tensor:
        """Summed loss of a micro-batch, without gradients."""
        self.objective.eval()
        loss = self.deepspeed(**batch.to(self.world.device, non_blocking=True).inputs())
        self.on_progress()
        return loss

    def _update(self, loss_sum: Tensor, learning_rate: float) -> tuple[float, float]:
        """Clip, then step unless a gradient is not finite.

        Returns the loss summed over ranks and the norm before clipping, which is not finite if nothing changed. Both
        are read from the device together, after as much work as possible is queued.
        """
        for group in self.base_optimizer.param_groups:
            group["lr"] = learning_rate
        if self.flat:
            return self.flat.step(loss_sum)
        if self.world.size > 1:
            dist.all_reduce(loss_sum)
        if self.stage == 0:
            return self._update_replicated(loss_sum)
        self.deepspeed.step()
        skipped = bool(getattr(self.deepspeed.optimizer, "overflow", False))
        return _read(loss_sum, math.inf if skipped else self.deepspeed.get_global_grad_norm())

    def _update_replicated(self, loss_sum: Tensor) -> tuple[float, float]:
        """Stage 0 in fp32, where DeepSpeed has no optimizer wrapper that clips and detects a bad step."""
        parameters = [parameter for _, parameter in self.trainable()]
        for parameter in parameters:
            if parameter.grad is None:  # its layer was not used: it still decays, as on several ranks
                parameter.grad = torch.zeros_like(parameter)
        limit = self.config.optim.max_grad_norm or math.inf
        loss, norm = _read(loss_sum, torch.nn.utils.clip_grad_norm_(parameters, limit))
        if not math.isfinite(norm):
            for parameter in parameters:
                parameter.grad = None
        self.deepspeed.step()
        return loss, norm

    def trainable(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Parameters by name in the transformers or peft model, without wrappers; in the same order on every rank."""
        return self._trainable

    def trainable_shapes(self) -> dict[str, list[int]]:
        """Full shapes by name, even if ZeRO-3 partitions the parameter."""
        return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in self.trainable()}

    @property
    def flash(self) -> bool:
        """Whether attention is flash attention, which needs no mask for packed rows."""
        return str(self.objective.causal_lm.config._attn_implementation).startswith("flash")

    @property
    def total_parameters(self) -> int:
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in self.objective.parameters())
        return parameters + held_elements(self.objective)

    @property
    def trainable_share(self) -> float:
        return self.trainable_parameters / self.total_parameters

    @property
    def trainable_parameters(self) -> int:
        return sum(getattr(p, "ds_numel", p.numel()) for _, p in self.trainable())


def stage_of(model: nn.Module, config: RunConfig, world: World) -> int:
    """The ZeRO stage for training `model` with its adapters."""
    trainable = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
    return effective_stage(config, world.size, trainable=trainable)


def _read(loss: Tensor, norm: Tensor | float) -> tuple[float, float]:
    """Read both together: one GPU synchronisation."""
    read = torch.stack([loss, torch.as_tensor(norm).to(loss)]).tolist()
    return read[0], read[1]
