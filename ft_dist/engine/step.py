"""One optimizer step over micro-batches, the same for every ZeRO stage.

The summed loss of a micro-batch is scaled by world_size / labelled tokens of the global batch before backward:
DeepSpeed averages gradients over ranks, so that what reaches the optimizer is exactly sum(loss) / sum(labelled tokens),
however the batch was cut.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ft_dist.config.schema import RunConfig
from ft_dist.data.batch import MicroBatch
from ft_dist.distributed import World, sum_over_ranks
from ft_dist.engine.settings import deepspeed_config, effective_stage
from ft_dist.loss import CausalObjective
from ft_dist.optim.build import build_optimizer, parameter_groups


@dataclass(frozen=True)
class StepResult:
    """What one step did. `loss` is the mean over labelled tokens; `skipped` means that no weight changed.

    `sums` are the caller's numbers, added up over all ranks. `abandoned`: a rank had no data and the step was not made.
    `held_up_s` of its time went by in `before_update`.
    """

    loss: float
    grad_norm: float
    skipped: bool
    sums: list[float]
    abandoned: bool = False
    held_up_s: float = 0.0


class Engine:
    """DeepSpeed around the objective: `train_step` in, `StepResult` out."""

    def __init__(self, objective: CausalObjective, config: RunConfig, world: World) -> None:
        import deepspeed

        self.config = config
        self.world = world
        self.stage = effective_stage(config, world.size)
        self.objective = objective
        self.kernels = ""
        self.on_progress: Callable[[], None] = lambda: None
        """Called after every forward of a micro-batch, with its backward if it has one"""
        self.before_update: Callable[[], float] = lambda: 0.0
        """Called before weights and optimizer state change; returns the seconds that it held the step up"""
        # a walk over all modules takes milliseconds; every save asks
        self._trainable = [(name, p) for name, p in objective.model.named_parameters() if p.requires_grad]
        groups = parameter_groups(objective.model.named_parameters(), config.optim)
        optimizer = build_optimizer(groups, config.optim)
        self.deepspeed, *_ = deepspeed.initialize(
            model=objective,
            optimizer=optimizer,
            config=deepspeed_config(
                config, ranks=world.size, device_type=world.device.type, trainable=self.trainable_parameters
            ),
            dist_init_required=False,
        )
        if self.stage == 0 and world.size == 1:
            # DeepSpeed would flatten all gradients, reduce them over one rank and copy them back
            self.deepspeed.enable_backward_allreduce = False
        # the trial step that some of its optimizers take at the start would count as a step of Adam
        self.base_optimizer.state.clear()

    @property
    def base_optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer below DeepSpeed's wrappers; its state is keyed by flat fp32 partitions."""
        return self.deepspeed.basic_optimizer if self.stage == 0 else self.deepspeed.optimizer.optimizer

    def train_step(
        self,
        micro_batches: Sequence[MicroBatch],
        *,
        labelled_tokens: int,
        learning_rate: float,
        to_sum: Callable[[], Sequence[float]] = list,
        abandon: bool = False,
    ) -> StepResult:
        """Forward and backward over this rank's micro-batches, then one update.

        `labelled_tokens` counts the global batch. `to_sum`, asked for when this rank has done its part, travels with
        the loss's reduction: that is how a rank's wish to stop reaches all ranks in the same step at no extra cost.
        `abandon` on any rank leaves all weights as they are; gradients are then spoilt, and the run must end.
        """
        self.objective.train()
        scale = self.world.size / labelled_tokens
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for index, batch in enumerate(micro_batches):
            self.deepspeed.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
            loss = self.deepspeed(**batch.to(self.world.device).inputs())
            loss_sum += loss.detach()
            self.deepspeed.backward(loss * scale, scale_wrt_gas=False)
            self.on_progress()
        total, abandoning, *sums = sum_over_ranks([loss_sum.item(), float(abandon), *to_sum()], self.world)
        if abandoning:
            return StepResult(loss=math.nan, grad_norm=math.nan, skipped=True, sums=sums, abandoned=True)
        held_up_s = self.before_update()
        grad_norm, skipped = self._update(learning_rate)
        loss = total / labelled_tokens
        return StepResult(loss=loss, grad_norm=grad_norm, skipped=skipped, sums=sums, held_up_s=held_up_s)

    @torch.no_grad()
    def loss_sum(self, batch: MicroBatch) -> torch.Tensor:
        """Summed loss of a micro-batch, without gradients."""
        self.objective.eval()
        loss = self.deepspeed(**batch.to(self.world.device).inputs())
        self.on_progress()
        return loss

    def _update(self, learning_rate: float) -> tuple[float, bool]:
        """Clip, then step unless a gradient is not finite. Returns the norm before clipping and whether it skipped."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.stage == 0:
            return self._update_replicated()
        self.deepspeed.step()
        skipped = bool(getattr(self.deepspeed.optimizer, "overflow", False))
        return (math.nan if skipped else float(self.deepspeed.get_global_grad_norm())), skipped

    def _update_replicated(self) -> tuple[float, bool]:
        """Stage 0 in fp32, where DeepSpeed has no optimizer wrapper of its own to clip and to tell a bad step."""
        parameters = [parameter for _, parameter in self.trainable()]
        for parameter in parameters:
            if parameter.grad is None:  # of a layer that nothing went through: still decayed, as on several ranks
                parameter.grad = torch.zeros_like(parameter)
        limit = self.config.optim.max_grad_norm or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
        skipped = not math.isfinite(norm)
        if skipped:
            for parameter in parameters:
                parameter.grad = None
        self.deepspeed.step()
        return (math.nan if skipped else norm), skipped

    def trainable(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Named as in the transformers or peft model, whatever wraps it; the same order on every rank."""
        return self._trainable

    def trainable_shapes(self) -> dict[str, list[int]]:
        """Whole shapes by name, also where ZeRO-3 has the parameter in parts."""
        return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in self.trainable()}

    @property
    def flash(self) -> bool:
        """Whether attention is flash attention, which needs no mask for packed rows."""
        return str(self.objective.causal_lm.config._attn_implementation).startswith("flash")

    @property
    def total_parameters(self) -> int:
        return sum(getattr(p, "ds_numel", p.numel()) for p in self.objective.parameters())

    @property
    def trainable_share(self) -> float:
        return self.trainable_parameters / self.total_parameters

    @property
    def trainable_parameters(self) -> int:
        return sum(getattr(p, "ds_numel", p.numel()) for _, p in self.trainable())
