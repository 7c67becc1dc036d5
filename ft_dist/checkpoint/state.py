"""What state.json of a commit holds, each key spelled once: the run's position, counters, shapes and config."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ft_dist.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class RunState:
    """The state after optimizer step `step`. Fields are saved in this order under their own names.

    A commit written before a field existed loads with the field's default. The run sets the fields up to `versions`;
    `CheckpointKeeper` adds the rest.
    """

    step: int
    data: dict[str, Any] | None = None
    """Position of the data stream; None for an imported checkpoint, which starts with the first sample"""
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    tokens: int = 0
    loss: float | None = None
    wandb_run_id: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    adam_step: int = 0
    parameters: dict[str, list[int]] = field(default_factory=dict)
    """Shapes of the trainable parameters"""
    held_out_losses: dict[int, float] = field(default_factory=dict)
    """By step, up to this one; infinite if not finite, which is saved as null"""
    world_size: int | None = None
    zero_stage: int | None = None
    imported_from: str | None = None
    """Folder of the other trainer's checkpoint; saved only if set"""
    config: dict[str, Any] | None = None
    config_hash: str | None = None
    base: dict[str, Any] | None = None
    """Name and digests of the base model"""

    def to_dict(self) -> dict[str, Any]:
        """The content of state.json."""
        saved = {each.name: getattr(self, each.name) for each in fields(self)}
        losses = self.held_out_losses.items()
        saved["held_out_losses"] = {step: loss if math.isfinite(loss) else None for step, loss in losses}
        if self.imported_from is None:
            del saved["imported_from"]
        return saved

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "RunState":
        """Raises CheckpointError if `saved` has no step. Keys that no field names are ignored."""
        if "step" not in saved:
            raise CheckpointError("state.json has no step, so it is not the state of a run. Name another checkpoint.")
        known = {each.name: saved[each.name] for each in fields(cls) if each.name in saved}
        losses = (known.get("held_out_losses") or {}).items()
        known["held_out_losses"] = {int(step): math.inf if loss is None else loss for step, loss in losses}
        return cls(**known)

    @property
    def identity(self) -> dict[str, Any]:
        """What `ft_dist.checkpoint.identity` compares on resume."""
        return {"config": self.config, "config_hash": self.config_hash, "base": self.base}
