"""The work that every side does: the same checkpoint, rows, labels, precision, adapters, batch and learning rate."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Case:
    """`rows` are per optimizer step; a peer reads `ordered` from its first row to its last, once.

    `ordered` is a JSON Lines file of chats in the order of our own run. `packed` asks for the side's
    own way to avoid padding, if it has one that keeps samples apart on this device.
    """

    model: Path
    ordered: Path
    method: str
    dtype: str
    steps: int
    rows: int
    max_length: int
    learning_rate: float
    rank: int = 16
    alpha: int = 32
    targets: tuple[str, ...] = TARGETS
    packed: bool = False
    device: str = "cpu"
    seed: int = 0

    @property
    def torch_dtype(self) -> str:
        return {"fp32": "float32", "bf16": "bfloat16"}[self.dtype]

    @property
    def packed_length(self) -> int:
        """Tokens of a row that holds about `rows` samples: the mean of a step, but at least the longest sample."""
        counts = json.loads(self.ordered.with_name("counts.json").read_text(encoding="utf-8"))
        mean = sum(counts["real"]) / len(counts["real"])
        return 8 * math.ceil(max(mean, counts["longest"]) / 8)


@dataclass(frozen=True)
class Command:
    """The command to start, and where it logs its steps: on its output, or in a JSON Lines file that it appends to."""

    arguments: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    steps_file: Path | None = None


@dataclass(frozen=True)
class Step:
    """A log line that marks the end of an optimizer step. `loss` is the mean over labelled tokens."""

    number: int
    loss: float


@dataclass(frozen=True)
class Peer:
    """How to start a peer and read its log.

    `command(case, folder, binaries)` writes its config into `folder`; `binaries` is its environment's bin/. `step_of`
    gets a line of its log and the number of steps seen before. `losses` reads exact losses by step after the run
    if the log rounds them. `packs`: whether it has a correct way to pack here; `note`: what else a reader
    of the table should know.
    """

    name: str
    command: Callable[[Case, Path, Path], Command]
    step_of: Callable[[str, int], Step | None]
    losses: Callable[[Path], dict[int, float]] = lambda folder: {}
    packs: bool = False
    order: Callable[[int, int], list[int]] = lambda rows, seed: list(range(rows))
    """If its loader shuffles: position in training -> row of the file"""
    note: str = ""
