"""Prints the bytes of all tensors of an engine that does not train, as a multiple of the model's weights.

`python -m tests.run.proof.weights_only CONFIG [key=value ...]`; model.path is a folder. The engine has computed a loss.
"""

import gc
import sys

import numpy as np
import torch

from ft_dist.config import load_config
from ft_dist.distributed import join_world, leave_world
from ft_dist.engine.build import build_engine
from ft_dist.engine.probe import Probe, unreached
from ft_dist.model.tokenizer import configured_tokenizer
from ft_dist.network.open import open_store


def main() -> None:
    config = load_config(sys.argv[1], sys.argv[2:])
    tokenizer, _ = configured_tokenizer(config.model, config.model.path)
    world = join_world(open_store(timeout_s=60), timeout_s=60)
    engine = build_engine(config, world, folder=config.model.path, tokenizer=tokenizer, trains=False)
    assert unreached(engine, Probe(np.arange(20), np.arange(20) < 19)) == []
    weights = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in engine.objective.parameters())
    tensors = [one for one in gc.get_objects() if isinstance(one, torch.Tensor)]
    held = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    print(sum(held.values()) / weights)
    leave_world()


if __name__ == "__main__":
    main()
