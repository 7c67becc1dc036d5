"""What state.json of a commit holds, each key spelled once: the run's position, counters, shapes and config."""

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AllowInfNan, BeforeValidator, Field

from ft_dist.errors import CheckpointError
from ft_dist.outside import Document, validated

Count = Annotated[int, Field(ge=0, le=2**62)]
Loss = Annotated[float, AllowInfNan(True), BeforeValidator(lambda loss: math.inf if loss is None else loss)]
"""Infinite if it was not finite, which is saved as null"""
Tree = dict[str, Any]


class WeightFile(Document):
    bytes: Count
    xxh3: str


class BaseRecord(Document):
    """The base model that training began with. A digest that is None is unknown."""

    path: str
    revision: str | None = None
    commit: str | None = None
    """Of a hub model: what `revision` meant when the run began"""
    files: dict[str, WeightFile] | None = None
    """Every weight file"""
    digest: str | None = None
    """Of samples of the weight files; the only one in older versions"""
    config_digest: str | None = None
    code_digest: str | None = None


class SavedConfig(Document):
    """The sections that are read from the config of a commit, which may be that of another version."""

    method: Tree = Field(default_factory=dict)
    optim: Tree = Field(default_factory=dict)


class RunState(Document):
    """The state after optimizer step `step`. Fields are saved in this order under their own names.

    A commit written before a field existed loads with the field's default. The run sets the fields up to `versions`;
    `CheckpointKeeper` adds the rest.
    """

    step: Count
    data: Tree | None = None
    """Position of the data stream; None for an imported checkpoint, which starts with the first sample"""
    skipped_steps: Count = 0
    skipped_in_a_row: Count = 0
    tokens: Count = 0
    loss: Annotated[float, AllowInfNan(True)] | None = None
    wandb_run_id: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    adam_step: Count = 0
    parameters: dict[str, list[Count]] = Field(default_factory=dict)
    """Shapes of the trainable parameters"""
    held_out_losses: dict[Count, Loss] = Field(default_factory=dict)
    """By step, up to this one"""
    world_size: Count | None = None
    zero_stage: Annotated[int, Field(ge=0, le=3)] | None = None
    imported_from: str | None = None
    """Folder of the other trainer's checkpoint; saved only if set"""
    run_id: str | None = None
    """See `ft_dist.checkpoint.run_record`; None in older versions"""
    config: Tree | None = None
    config_hash: str | None = None
    base: BaseRecord | None = None

    def to_dict(self) -> Tree:
        """The content of state.json."""
        saved = {name: getattr(self, name) for name in type(self).model_fields}
        saved["base"] = self.base.model_dump() if self.base else None
        losses = self.held_out_losses.items()
        saved["held_out_losses"] = {step: loss if math.isfinite(loss) else None for step, loss in losses}
        if self.imported_from is None:
            del saved["imported_from"]
        return saved

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any], *, where: object = "state.json") -> "RunState":
        """Raises CheckpointError, which names the first key that is missing or wrong. Other keys are ignored."""
        state = validated(dict(saved), cls, where=where, error=CheckpointError)
        if state.config is not None:
            validated(state.config, SavedConfig, where=f"{where}: config", error=CheckpointError)
        return state

    @property
    def identity(self) -> Tree:
        """What `ft_dist.checkpoint.identity` compares on resume."""
        return {"config": self.config, "config_hash": self.config_hash, "base": self.base}
