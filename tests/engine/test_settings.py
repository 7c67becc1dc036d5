"""What DeepSpeed is told; what it then allocates is measured in tests/plan/test_measured.py."""

import pytest

from ft_dist.config import load_config
from ft_dist.engine.settings import REDUCE_BUCKET_ELEMENTS, deepspeed_config


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(
    "trainable, elements", [(17_920, 17_920), (17_921, 17_922), (8_000_000_000, REDUCE_BUCKET_ELEMENTS)]
)
def test_a_bucket_is_no_larger_than_what_is_trained(stage, trainable, elements):
    config = load_config("smoke", [f"engine.zero_stage={stage}"])
    zero = deepspeed_config(config, trainable=trainable)["zero_optimization"]
    assert zero["reduce_bucket_size"] == elements
