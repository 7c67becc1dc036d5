"""What a measurement runs: a training config, real or synthetic data, and the number of steps."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from ft_dist.bench.shapes import SHAPES, write_shape
from ft_dist.bench.synthetic import median_of
from ft_dist.config import RunConfig
from ft_dist.config.load import apply_override, validate
from ft_dist.errors import UserError
from ft_dist.outside import parse_object

SYNTHETIC = "synthetic"


@dataclass(frozen=True)
class Spec:
    """One measurement. `tree` is the config; `median_length` None fills every row with one sample."""

    tree: dict[str, Any]
    result: str
    synthetic: bool = True
    random_weights: bool = True
    median_length: int | None = None
    labelled: float = 1.0
    warmup: int = 2
    steps: int = 5
    phase_steps: int = 2
    checkpoint: bool = True
    force: bool = False
    """Start even if the memory plan does not fit"""
    settings: dict[str, Any] = field(default_factory=dict)
    """Overrides that distinguish this measurement from the others of a sweep"""

    def config(self) -> RunConfig:
        """Raises ConfigError."""
        return validate(json.loads(json.dumps(self.tree)))

    def write(self, path: Path) -> Path:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")
        return path

    @classmethod
    def read(cls, path: Path) -> "Spec":
        return TypeAdapter(cls).validate_python(parse_object(path.read_bytes(), where=path, error=UserError))

    def changed(self, settings: dict[str, Any], folder: Path) -> "Spec":
        """The same measurement with other values at `key.sub` and its own `folder`."""
        tree = json.loads(json.dumps(self.tree))
        for key, value in settings.items():
            apply_override(tree, f"{key}={json.dumps(value)}")
        tree["output_dir"] = str(folder / "run")
        return replace(self, tree=tree, result=str(folder / "result.json"), settings={**self.settings, **settings})


def make_spec(
    model: str,
    overrides: Sequence[str],
    *,
    data: str,
    method: str,
    length: int,
    rows: int,
    lengths: str,
    labelled: float,
    steps: int,
    checkpoint: bool,
    folder: Path,
    force: bool = False,
) -> Spec:
    """`rows` packed rows of `length` tokens per rank and micro-batch. Raises UserError."""
    from ft_dist.launcher.machine import gpus

    synthetic = data == SYNTHETIC
    if not synthetic and model in SHAPES and model != "smollm2-135m":
        raise UserError(
            f"{model} is a shape with random weights and has no tokenizer for {data}. Omit --data, or name a "
            "model folder."
        )
    if not 0 < labelled <= 1:
        raise UserError(f"--labelled {labelled}: must be above 0 and at most 1.")
    by_name = synthetic and model in SHAPES
    if synthetic and not by_name and not (Path(model) / "config.json").is_file():
        raise UserError(f"{model}: neither a model folder nor one of the shapes {', '.join(SHAPES)}.")
    tree: dict[str, Any] = {
        "model": {
            "path": str(write_shape(model, folder / "model")) if by_name else model,
            "dtype": "bf16" if gpus() else "fp32",
        },
        "method": {"kind": method},
        "data": {"train": [data], "max_length": length},
        "batch": {"global_rows": rows, "micro_rows": rows},
        "optim": {"schedule": "constant", "max_steps": 10**6, "epochs": 10**6},
        "checkpoint": {"interval_steps": 0, "resume": "never"},
        "output_dir": str(folder / "run"),
    }
    for override in overrides:
        apply_override(tree, override)
    return Spec(
        tree=tree,
        result=str(folder / "result.json"),
        synthetic=synthetic,
        random_weights=by_name,
        median_length=median_of(lengths),
        labelled=labelled,
        steps=steps,
        checkpoint=checkpoint,
        force=force,
    )
