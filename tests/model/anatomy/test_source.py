"""Weights that a layer's code reads past an adapter: branches that the config turns off do not count."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from ft_dist.model.anatomy.source import reads_weight
from ft_dist.model.parts.layers import layers_of
from tests.families.architectures import tiny_config


class Layer(nn.Module):
    """`self.plain` is called; the others are read in branches."""

    def __init__(self, config):
        super().__init__()
        self.config, self.slices, self.exact = config, config.slices, config.exact
        self.fast = True
        for name in ("plain", "sliced", "otherwise", "trained", "clipped", "own"):
            setattr(self, name, nn.Linear(4, 4))

    def forward(self, x):
        x = self.plain(x.to(self.plain.weight.dtype))
        if self.slices > 1 and self.exact:
            for row in self.sliced.weight:
                x = x + row
        else:
            x = x @ self.otherwise.weight
        if self.training and self.slices > 1:
            x = x @ self.trained.weight
        x = x if self.config.clip is None else x @ self.clipped.weight
        return x @ self.own.weight if self.fast else self.own(x)


@pytest.mark.parametrize(
    "settings, read",
    [
        ({"slices": 1, "exact": True, "clip": None}, {"otherwise", "own"}),
        ({"slices": 2, "exact": False, "clip": 1.0}, {"otherwise", "trained", "clipped", "own"}),
        ({"slices": 2, "exact": True, "clip": None}, {"sliced", "trained", "own"}),
    ],
)
def test_branches(settings, read):
    config = LlamaConfig(**settings)
    layer = Layer(config)
    assert {name for name, _ in layer.named_children() if reads_weight(layer, name, config=config)} == read


@pytest.mark.parametrize("pretraining_tp, unfit", [(1, set()), (2, {"dense", "dense_4h_to_h"})])
def test_bloom_reads_weights_only_if_its_config_says_so(pretraining_tp, unfit):
    config = tiny_config("bloom")
    config.pretraining_tp, config.slow_but_exact = pretraining_tp, True
    layers = layers_of(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    assert {name.rpartition(".")[2] for name in layers.unfit} == unfit
