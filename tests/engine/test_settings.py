"""The settings given to DeepSpeed; tests/plan/test_measured.py measures what it then allocates."""

import pytest

from ft_dist.config import load_config
from ft_dist.engine.settings import (
    REDUCE_BUCKET_ELEMENTS,
    WHOLE_GRADIENT_ELEMENTS,
    deepspeed_config,
    effective_stage,
)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(
    "trainable, elements", [(17_920, 17_920), (17_921, 17_922), (8_000_000_000, REDUCE_BUCKET_ELEMENTS)]
)
def test_a_bucket_is_no_larger_than_the_trained_parameters(stage, trainable, elements):
    config = load_config("smoke", [f"engine.zero_stage={stage}"])
    zero = deepspeed_config(config, stage=stage, device_type="cpu", trainable=trainable)["zero_optimization"]
    assert zero["reduce_bucket_size"] == elements


FEW, MANY = WHOLE_GRADIENT_ELEMENTS, WHOLE_GRADIENT_ELEMENTS + 1


@pytest.mark.parametrize(
    "asked, dtype, ranks, trainable, stage",
    [
        ("auto", "fp32", 1, FEW, 0),
        ("auto", "fp32", 2, FEW, 2),
        ("auto", "bf16", 1, FEW, 1),
        ("auto", "bf16", 1, MANY, 1),
        ("auto", "bf16", 2, FEW, 1),
        ("auto", "bf16", 2, MANY, 2),
        ("0", "bf16", 1, FEW, 1),
        ("2", "bf16", 1, FEW, 2),
        ("3", "fp32", 1, FEW, 3),
    ],
)
def test_stage(asked, dtype, ranks, trainable, stage):
    config = load_config("smoke", [f"engine.zero_stage={asked}", f"model.dtype={dtype}"])
    assert effective_stage(config, ranks, trainable=trainable) == stage


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_offloaded_state_needs_a_stage_that_supports_it(dtype):
    config = load_config("smoke", ["engine.zero_stage=auto", f"model.dtype={dtype}", "engine.offload=cpu"])
    assert effective_stage(config, 1, trainable=FEW) == 2
