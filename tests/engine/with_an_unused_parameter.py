"""A real run of a model with one weight that no forward pass uses: `python -m ... OUT CONFIG [key=value ...]`.

Writes that weight's value after each step.
"""

import functools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn


def main() -> None:
    out, config_name, *overrides = sys.argv[1:]
    import ft_dist.run.start
    from ft_dist.config import load_config
    from ft_dist.engine.step import Engine
    from ft_dist.model.load import Loaded, load_model
    from ft_dist.preemption.stop import StopRequest
    from ft_dist.train import train

    def load(*arguments: Any, **options: Any) -> Loaded:
        model, notes = load_model(*arguments, **options)
        model.register_parameter("unused", nn.Parameter(torch.ones(2, 3)))
        return Loaded(model, notes)

    seen: list[list[float]] = []
    original = Engine.train_step

    def noted(self: Engine, *arguments: Any, **options: Any) -> Any:
        result = original(self, *arguments, **options)
        (weight,) = (parameter for name, parameter in self.trainable() if name.endswith("unused"))
        seen.append(weight.flatten().tolist())
        return result

    Engine.train_step = noted  # type: ignore[method-assign]
    ft_dist.run.start.build_engine = functools.partial(ft_dist.run.start.build_engine, load=load)
    train(load_config(config_name, overrides), StopRequest())
    Path(out).write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
