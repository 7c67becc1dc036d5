"""One piece of work that every side does: the same checkpoint, rows, labels, precision, adapters, batch and rate."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Case:
    """Rows are counted in an optimizer step; a peer reads `ordered` from its first row to its last, once.

    `ordered` is a JSON Lines file of chats in the order in which our own run deals them. `packed` asks for the side's
    own way of leaving padding out, where it has one that keeps samples apart on this device.
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
        """Tokens of a row that holds about `rows` samples: the mean of a step, but no less than the longest sample."""
        counts = json.loads(self.ordered.with_name("counts.json").read_text(encoding="utf-8"))
        mean = sum(counts["real"]) / len(counts["real"])
        return 8 * math.ceil(max(mean, counts["longest"]) / 8)


@dataclass(frozen=True)
class Command:
    """What to start, and where its steps are told: on its output, or in a file of JSON lines that it appends to."""

    arguments: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    steps_file: Path | None = None


@dataclass(frozen=True)
class Step:
    """A line of a log that says that an optimizer step is done. `loss` is the mean over labelled tokens."""

    number: int
    loss: float


@dataclass(frozen=True)
class Peer:
    """How one of them is started and read.

    `command(case, folder, binaries)` writes its config into `folder`; `binaries` is its environment's bin/. `step_of`
    gets a line of its log and the number of steps seen before. `losses` reads exact losses by step once it has ended,
    where the log rounds them. `packs` says whether it has a way to pack that is correct here, `note` what else a reader
    of the table must know.
    """

    name: str
    command: Callable[[Case, Path, Path], Command]
    step_of: Callable[[str, int], Step | None]
    losses: Callable[[Path], dict[int, float]] = lambda folder: {}
    packs: bool = False
    order: Callable[[int, int], list[int]] = lambda rows, seed: list(range(rows))
    """Where row i of the file comes in training, if its loader shuffles: position -> row"""
    note: str = ""
