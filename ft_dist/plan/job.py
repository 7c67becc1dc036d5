"""A config on a given model and world, as the numbers that determine memory and time."""

from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec

from ft_dist.config.schema import RunConfig
from ft_dist.engine.settings import WHOLE_GRADIENT_ELEMENTS, effective_stage
from ft_dist.model.shape import ModelShape, Parameter, model_shape

BYTES = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class Job:
    """What runs on each rank. Sizes in elements and bytes; `labelled` is the share of tokens that carry a label."""

    shape: ModelShape
    config: RunConfig
    ranks: int
    ranks_per_node: int
    gpu: bool
    flash: bool = False
    labelled: float = 1.0

    @property
    def stage(self) -> int:
        return effective_stage(self.config, self.ranks, trainable=self.trainable)

    @property
    def gradients_at_once(self) -> bool:
        """Whether stage 1 accumulates a micro-batch's gradients all at once (engine/flat_update.py)."""
        return self.stage == 1 and self.item == 2 and not self.offload and self.trainable <= WHOLE_GRADIENT_ELEMENTS

    @property
    def frozen_base(self) -> bool:
        """Whether the model's own weights are not trained."""
        return self.config.method.frozen_base

    @property
    def checkpointing(self) -> bool:
        return self.config.engine.activation_checkpointing

    @property
    def offload(self) -> bool:
        """Whether the optimizer's state is on the host."""
        return self.config.engine.offload != "none"

    @property
    def fused(self) -> bool:
        return self.config.model.kernels != "off" and self.shape.known

    @property
    def fused_head(self) -> bool:
        return self.config.model.kernels != "off"

    @property
    def remakes_product(self) -> bool:
        """Whether backward recomputes the gated MLP's product, as the layers of `model/fused` do on a GPU."""
        return self.gpu and self.fused and self.config.model.kernels != "torch" and not self.checkpointing

    @property
    def item(self) -> int:
        """Bytes of a weight and of an activation."""
        return BYTES[self.config.model.dtype]

    @property
    def rows(self) -> int:
        """Rows of one forward: a rank's share of the global batch may be less than batch.micro_rows."""
        return min(self.config.batch.micro_rows, -(-self.config.batch.global_rows // self.ranks))

    @property
    def length(self) -> int:
        return self.config.data.max_length

    @property
    def tokens(self) -> int:
        """T: tokens of a micro-batch."""
        return self.rows * self.length

    @property
    def micro_batches(self) -> int:
        """Maximum number of forward passes of any rank in a step."""
        return -(-self.config.batch.global_rows // (self.ranks * self.rows))

    @property
    def step_tokens(self) -> int:
        """Tokens of a step, over all ranks."""
        return self.config.batch.global_rows * self.length

    @property
    def masked(self) -> bool:
        """Whether attention needs a mask of length x length."""
        apart = self.flash or self.by_segment or self.config.model.attention == "flex_attention"
        return self.config.data.packs and not apart

    @property
    def by_segment(self) -> bool:
        """Whether our attention runs sample by sample."""
        sdpa = self.config.model.attention in ("auto", "sdpa") and not self.flash
        return self.fused and sdpa and not self.shape.form.softcapped_scores

    @cached_property
    def adapted(self) -> list[Parameter]:
        """The matrices that carry adapters."""
        return self.config.method.adapted(self.shape)

    @cached_property
    def trained(self) -> list[Parameter]:
        """Parameters with a gradient, adapters by their own names."""
        return self.config.method.trained(self.shape)

    @property
    def trains_head(self) -> bool:
        """Whether the output head's matrix itself has a gradient."""
        return not self.frozen_base or any(parameter.name == self.shape.head.name for parameter in self.trained)

    @cached_property
    def trainable(self) -> int:
        return sum(parameter.numel for parameter in self.trained)

    @cached_property
    def total(self) -> int:
        """Parameters of the model with its adapters."""
        return self.shape.total_parameters + (self.trainable if self.frozen_base else 0)

    @cached_property
    def spare_columns(self) -> int:
        """Elements next to the frozen weights of layers that run as one product, for their adapters.

        The same choice as `suits_extended` and `model/fused`: 16 bits on a GPU, no ZeRO-3 or FP8, a method that merges.
        """
        method = self.config.method
        separate = self.stage == 3 or self.config.model.base_dtype is not None or self.config.model.kernels == "torch"
        if separate or not (self.gpu and self.fused and self.item == 2 and method.merges_products):
            return 0
        joined, heights = self.shape.form.joined, {name: out for name, out, _ in self.shape.linears()}
        groups = [["mlp.gate_up_proj"] if joined else ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]
        if not self.shape.form.head_norms:
            groups.append(["self_attn.qkv_proj"] if joined else [f"self_attn.{part}_proj" for part in "qkv"])
        elements = 0
        for names in groups:
            if self.adapted_names.issuperset(names):
                elements += -(-len(names) * method.adapter_rank // 16) * 16 * sum(heights[name] for name in names)
        return elements * self.shape.layers

    @cached_property
    def adapted_names(self) -> frozenset[str]:
        """Names within a block: `mlp.up_proj` and so on."""
        return frozenset(
            parameter.name.split(".", 3)[3].removesuffix(".weight")
            for parameter in self.adapted
            if parameter.layer is not None
        )


def job_of(
    config: RunConfig, *, ranks: int, ranks_per_node: int | None = None, gpu: bool = True, flash: bool = False
) -> Job:
    """Raises ModelError for a model that cannot be planned, or options of the method that match nothing in it."""
    shape = model_shape(config.model.path, revision=config.model.revision)
    config.method.adapted(shape)
    return Job(shape, config, ranks, ranks_per_node or ranks, gpu, flash)


def flash_here(config: RunConfig) -> bool:
    """Whether a run on GPUs with this machine's packages uses flash attention."""
    attention = config.model.attention
    if attention == "auto":
        return config.model.dtype == "bf16" and find_spec("flash_attn") is not None
    return attention == "flash_attention_2"
