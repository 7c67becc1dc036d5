"""The memory touched in advance is the memory that a step will need."""

import pytest
import torch

from ft_dist.config import load_config
from ft_dist.plan.job import Job, job_of
from ft_dist.plan.memory.total import memory_plan
from ft_dist.run import warm_memory as ahead
from ft_dist.run.warm_memory import sure_bytes

ROWS = ["model.dtype=fp32", "data.max_length=64", "batch.micro_rows=1", "batch.global_rows=1", "engine.zero_stage=0"]


def job(*overrides: str) -> Job:
    return job_of(load_config("smoke", [*ROWS, *overrides]), ranks=1, ranks_per_node=1, gpu=False, flash=False)


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("rows", [1, 8])
def test_no_more_than_planned_is_touched(kind, rows):
    one = job(f"method.kind={kind}", f"batch.micro_rows={rows}", f"batch.global_rows={rows}")
    assert one.trainable * 4 * 3 < sure_bytes(one) <= memory_plan(one).tensors


def test_weights_gradients_and_moments_are_touched_in_full_training():
    one = job("method.kind=full")
    assert sure_bytes(one) >= one.trainable * 4 * 4
    frozen = one.total * 4
    assert sure_bytes(job("method.kind=lora")) < frozen, "they stay in the file"


def test_if_a_gpu_may_exist_torch_decides_and_nothing_is_touched(monkeypatch):
    called = []
    monkeypatch.setattr(ahead, "gpus_here", lambda: True)
    monkeypatch.setattr(ahead, "touch_ahead", called.append)
    monkeypatch.setattr(ahead, "keep_freed_memory", lambda: called.append("kept"))
    free_memory = ahead.touch_planned(load_config("smoke", ROWS))
    assert called == []
    free_memory()
    assert called == ([] if torch.cuda.is_available() else ["kept"])
