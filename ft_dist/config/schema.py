"""The whole configuration as one tree. Unknown keys are errors; every field states its unit.

`ft-dist schema` prints the JSON schema of `RunConfig`; `output_dir/config.yaml` holds the resolved tree of a run.
"""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from ft_dist.method.section import LocalPath, Place, Section
from ft_dist.method.table import DEFAULT, MethodConfig, read_section
from ft_dist.storage import is_url

DataFormat = Literal["auto", "chat", "prompt_completion", "alpaca", "sharegpt", "text", "tokens"]


class ModelConfig(Section):
    """The pretrained model and its precision."""

    several_lines: ClassVar[tuple[str, ...]] = ("new_tokens",)

    path: Place = Field(description="Folder, hub id, or built-in name (see `ft-dist fetch --list`)")
    revision: str | None = Field(
        default=None, description="Branch, tag or commit on the hub; None takes the default branch"
    )
    dtype: Literal["bf16", "fp32"] = Field(
        default="bf16", description="Compute precision; optimizer state is always fp32"
    )
    base_dtype: Literal["fp8"] | None = Field(
        default=None,
        description="fp8 stores LoRA's frozen linear layers in e4m3 and multiplies in FP8, forward and backward: as "
        "much memory as bf16, and faster on GPUs with FP8. None keeps them in dtype",
    )
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"] = "auto"
    kernels: Literal["auto", "triton", "torch", "off"] = Field(
        default="auto",
        description="Fused layers: auto is triton on GPU and torch on CPU; off uses Hugging Face's layers",
    )
    trust_remote_code: bool = Field(
        default=False, description="Allow code from the model folder or hub repository to run"
    )
    new_tokens: list[str] = Field(default_factory=list, description="Special tokens to add; embeddings grow as needed")
    chat_template: LocalPath | None = Field(
        default=None, description="Path of a Jinja file that replaces the tokenizer's template"
    )


class SourceConfig(Section):
    """One data source: a file, a folder, a glob, a hub dataset, or a prepared set (folder or URL)."""

    path: Place
    format: DataFormat = "auto"
    weight: float = Field(default=1.0, gt=0, description="Average number of times that each sample is seen in an epoch")
    live: bool = Field(
        default=False,
        description="Tokenise during training, without preparation: for streams too large to store. Must be the only "
        "source of data.train; keeps the stream's order, shuffled within windows; needs optim.max_steps",
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="Maps our field names to column names, for example {prompt: text}"
    )
    split: str = Field(default="train", description="Split of a hub or saved dataset")
    name: str | None = Field(default=None, description="Configuration name of a hub dataset")


class DataConfig(Section):
    """The data, and how it becomes rows."""

    train: Annotated[list[SourceConfig], Field(min_length=1)]
    eval: list[SourceConfig] = Field(default_factory=list)
    max_length: Annotated[int, Field(ge=8)] = Field(default=2048, description="Tokens in a row")
    too_long: Literal["drop", "truncate", "error"] = Field(
        default="drop", description="How to handle a sample over max_length: drop and count it, truncate it, or fail"
    )
    packing: bool | Literal["auto"] = Field(
        default="auto",
        description="Pack several samples per row; attention stays within each sample. auto packs unless the model's "
        "layers cannot keep samples apart; true then stops the run",
    )
    curriculum: Literal["none", "length"] = Field(
        default="none", description="length: within each window of samples, rows are ordered from short to long samples"
    )
    temperature: float = Field(
        default=1.0, gt=0, description="Sources are seen in proportion to (weight * samples) ** (1 / temperature)"
    )
    shuffle_samples: Annotated[int, Field(ge=16)] = Field(
        default=2**20,
        description="Larger sets are shuffled in groups of 16 blocks with this many samples in total; the cache of "
        "remote shards must hold one group",
    )
    log_samples: bool = Field(default=False, description="Write the sample ids of every step to samples.jsonl")
    cache_dir: LocalPath | None = Field(
        default=None, description="Tokenised data; None is $FT_DIST_CACHE or ~/.cache/ft_dist"
    )
    cache_bytes: PositiveInt = Field(
        default=100 * 10**9,
        description="Disk space per node for shards of remote sets; the least recently used are evicted",
    )
    remote_wait_s: Annotated[float, Field(gt=0)] = Field(
        default=1800.0, description="Training fails after waiting this long for a remote store"
    )

    @field_validator("train", "eval", mode="before")
    @classmethod
    def _paths(cls, value: object) -> object:
        """A path, or a list of paths, is short for sources with default options."""
        if isinstance(value, str | dict):
            value = [value]
        if isinstance(value, list):
            return [{"path": item} if isinstance(item, str) else item for item in value]
        return value

    @model_validator(mode="after")
    def _live_stands_alone(self) -> "DataConfig":
        if any(source.live for source in self.train) and len(self.train) > 1:
            raise ValueError("a live source must be the only source of data.train; prepare it with the others instead")
        if any(source.live for source in self.eval):
            raise ValueError("a source of data.eval cannot be live, because the same samples are scored repeatedly")
        return self

    @property
    def packs(self) -> bool:
        """Whether samples share rows, unless the model's layers cannot keep them apart."""
        return self.packing is not False

    @property
    def live(self) -> SourceConfig | None:
        """The live source, if data.train is one."""
        return self.train[0] if self.train[0].live else None


class BatchConfig(Section):
    """Rows per optimizer step, over all ranks, and rows per forward pass. Gradient accumulation follows from them."""

    global_rows: PositiveInt = 32
    micro_rows: PositiveInt = 1
    halve_when_out_of_memory: bool = Field(
        default=False,
        description="Restart with half of micro_rows after running out of memory: the same batches of the same "
        "samples, in smaller pieces",
    )


class OptimConfig(Section):
    """The optimizer, its schedule and the length of the run."""

    kind: Literal["adamw", "adamw_8bit", "muon"] = Field(
        default="adamw",
        description="adamw_8bit stores AdamW's moments in 8 bits; muon orthogonalises updates of matrices",
    )
    lr: float = Field(default=2e-4, gt=0)
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    decay_steps: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="wsd only: length of the final decay; None is a tenth of the run"
    )
    min_lr_ratio: float = Field(
        default=0.0, ge=0, le=1, description="Final learning rate of cosine, linear and wsd, as a fraction of lr"
    )
    weight_decay: float = Field(default=0.0, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    momentum: float = Field(default=0.95, ge=0, lt=1, description="muon only")
    max_grad_norm: float = Field(default=1.0, ge=0, description="Global L2 norm to clip to; 0 disables clipping")
    epochs: PositiveInt | None = Field(
        default=None,
        description="Passes over data.train. None is 1 or, with max_steps, as many as these steps need",
    )
    max_steps: PositiveInt | None = Field(
        default=None, description="Stop after this many optimizer steps, or earlier if epochs is set and ends first"
    )
    max_skipped_steps: PositiveInt = Field(default=5, description="Stop after this many non-finite steps in a row")
    load_best: bool = Field(
        default=False,
        description="Write final/ from the step with the lowest held-out loss instead of the last one; commits every "
        "evaluated step and keeps the best. Needs evaluate.interval_steps",
    )

    @property
    def most_epochs(self) -> int | None:
        """The epochs after which a run ends; None if only max_steps ends it."""
        return self.epochs or (1 if self.max_steps is None else None)


class EngineConfig(Section):
    """How DeepSpeed shards the work."""

    zero_stage: Literal["auto", 0, 1, 2, 3] = Field(
        default="auto",
        description="What ranks shard; auto: 1 in bf16, or 2 if several ranks train many parameters; 2 in fp32, or 0 "
        "on one rank",
    )
    offload: Literal["none", "cpu", "nvme"] = Field(default="none", description="Where optimizer state is stored")
    nvme_path: LocalPath | None = None
    activation_checkpointing: bool = False
    timeout_s: PositiveInt = Field(
        default=1800,
        description="A collective operation that takes longer ends the run; remote data adds data.remote_wait_s",
    )
    hang_timeout_s: PositiveInt = Field(
        default=600,
        description="The run ends with exit code 76 and all ranks' stacks in logs/ if a rank makes no progress (a "
        "micro-batch, an evaluated batch, a wait for data) for this long; a commit may take engine.timeout_s",
    )
    verify_steps: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="Every this many steps and before every commit, all ranks compare checksums of their weights; the "
        "run ends and names the rank whose copy differs. 0 never does. Not at zero_stage 3, which has no copies",
    )

    @model_validator(mode="after")
    def _verify_what_has_copies(self) -> "EngineConfig":
        if self.verify_steps and self.zero_stage == 3:
            raise ValueError(
                f"verify_steps={self.verify_steps} needs zero_stage=auto, 0, 1 or 2: at stage 3 there is one copy of "
                "the weights, so ranks have nothing to compare"
            )
        return self

    @model_validator(mode="after")
    def _nvme_needs_a_path(self) -> "EngineConfig":
        if self.offload == "nvme" and not self.nvme_path:
            raise ValueError("offload=nvme needs engine.nvme_path, a folder on a local NVMe disk")
        if self.offload == "nvme" and self.zero_stage != 3:
            raise ValueError(f"offload=nvme needs zero_stage=3, not {self.zero_stage}")
        if self.offload == "cpu" and self.zero_stage == 0:
            raise ValueError("offload=cpu needs zero_stage 1, 2 or 3, not 0")
        return self


class CheckpointConfig(Section):
    """When to commit, how many to keep, what to start from."""

    interval_steps: Annotated[int, Field(ge=0)] = Field(
        default=100, description="0 commits only at the end and on a signal"
    )
    keep: PositiveInt = Field(default=2, description="Number of newest commits to keep")
    keep_every_steps: PositiveInt | None = Field(
        default=None, description="Milestones: commits at multiples of this step are never deleted"
    )
    keep_best: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Number of commits with the lowest held-out loss to keep; only evaluated steps count"
    )
    path: Place | None = Field(
        default=None,
        description="Mirror of every commit: a URL (s3://, gs://, az://, file://) or folder, written in the background "
        "and read if output_dir has no commit",
    )
    resume: LocalPath = Field(
        default="auto", description="auto: newest complete commit of output_dir; never; or a path"
    )

    @field_validator("path")
    @classmethod
    def _names_a_bucket(cls, value: str | None) -> str | None:
        scheme, separator, place = (value or "").partition("://")
        if separator and (not scheme or (not place.split("/")[0] and (scheme != "file" or not place.strip("/")))):
            raise ValueError(f"{value} names no bucket or folder; use a URL such as s3://bucket/run")
        return value


class PreemptionConfig(Section):
    """Preemption notices that a run watches in addition to signals."""

    cloud: Literal["none", "aws", "gcp", "azure"] = Field(
        default="none", description="Cloud whose metadata service to poll for notices; none disables polling"
    )
    endpoint: str | None = Field(
        default=None, description="Address of the metadata service; None is the cloud's default"
    )
    margin_s: Annotated[int, Field(ge=0)] = Field(
        default=120, description="A SLURM job stops this long, plus a step and a commit, before its time limit"
    )

    @model_validator(mode="after")
    def _endpoint_of_a_cloud(self) -> "PreemptionConfig":
        if self.endpoint and self.cloud == "none":
            raise ValueError(f"endpoint={self.endpoint} needs preemption.cloud=aws, gcp or azure, not none")
        if self.endpoint and not self.endpoint.startswith(("http://", "https://")):
            raise ValueError(f"endpoint={self.endpoint} is not an http:// or https:// address")
        return self


class EvaluateConfig(Section):
    """Scoring on `data.eval`: held-out loss, and generated answers compared with the references."""

    before: bool = Field(default=True, description="Evaluate the model before training")
    interval_steps: Annotated[int, Field(ge=0)] = Field(
        default=0, description="0 evaluates only before and after training"
    )
    patience: PositiveInt | None = Field(
        default=None,
        description="Stop after this many evaluations in a row without a new lowest held-out loss; None never stops "
        "early. Needs interval_steps",
    )
    generate: bool = Field(default=False, description="Also generate an answer to each prompt and count exact matches")
    max_new_tokens: PositiveInt = 32
    batch_rows: PositiveInt = 8
    max_samples: PositiveInt | None = Field(default=None, description="None uses all of data.eval")


class ObserveConfig(Section):
    """Where metrics are logged in addition to metrics.jsonl."""

    wandb: Literal["off", "offline", "online"] = "off"
    wandb_project: str = "ft_dist"
    tensorboard: bool = False
    run_name: str | None = None


class RunConfig(Section):
    """One fine-tuning run."""

    model: ModelConfig
    method: Annotated[MethodConfig, Field(discriminator="kind")] = Field(default_factory=DEFAULT)
    data: DataConfig
    batch: BatchConfig = Field(default_factory=BatchConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    preemption: PreemptionConfig = Field(default_factory=PreemptionConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    observe: ObserveConfig = Field(default_factory=ObserveConfig)
    output_dir: LocalPath
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    @field_validator("method", mode="wrap")
    @classmethod
    def _read_method(cls, value: object, parse: Any) -> Any:
        return read_section(value, parse) if isinstance(value, dict) else parse(value)

    @model_validator(mode="after")
    def _optimizer_where_it_can_be(self) -> "RunConfig":
        kind, offload = self.optim.kind, self.engine.offload
        if (kind == "muon" and offload != "none") or (kind == "adamw_8bit" and offload == "nvme"):
            raise ValueError(
                f"optim.kind={kind} cannot be used with engine.offload={offload}; set one of them to its default"
            )
        return self

    @model_validator(mode="after")
    def _fp8_base_where_it_can_be(self) -> "RunConfig":
        if self.model.base_dtype is None:
            return self
        conflict = self.method.fp8_conflict()
        if conflict:
            raise ValueError(conflict)
        if self.engine.zero_stage == 3:
            raise ValueError(
                "model.base_dtype=fp8 needs engine.zero_stage=auto, 0, 1 or 2: stage 3 partitions weights over ranks "
                "and gathers them in model.dtype"
            )
        return self

    @model_validator(mode="after")
    def _live_needs_an_end(self) -> "RunConfig":
        if self.data.live and not self.optim.max_steps:
            raise ValueError("a live source of data.train has no known length: set optim.max_steps")
        return self

    @property
    def collective_timeout_s(self) -> float:
        """Seconds that a rank waits for the others, which may be waiting for a remote store."""
        return self.engine.timeout_s + self._remote_wait_s

    @property
    def hang_timeout_s(self) -> float:
        """Seconds without progress after which a rank counts as hung; waiting for a store is not a hang."""
        return self.engine.hang_timeout_s + self._remote_wait_s

    @property
    def _remote_wait_s(self) -> float:
        remote = any(is_url(source.path) for source in (*self.data.train, *self.data.eval))
        return self.data.remote_wait_s if remote else 0

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir)
