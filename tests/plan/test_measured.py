"""The plan against the tensors alive at the peak of real runs on CPU, including DeepSpeed's own: within 5 %.

`make plan` runs all 24 combinations; the first few run here.
"""

import pytest

from ft_dist.config import load_config
from ft_dist.plan.job import job_of
from ft_dist.plan.memory.total import memory_plan
from tests.plan.combinations import COMBINATIONS, FP8, PACKED, Combination, measure

SHORT = [each for each in COMBINATIONS if each.name in ("tiny-lora-z2-r1-bf16", "tiny-full-z3-r2-bf16")]


def error(combination: Combination, folder) -> tuple[float, str]:
    real = max(measure(combination, folder)["peak_bytes"])
    config = load_config("smoke", combination.overrides(folder / "text.jsonl", folder / "run"))
    planned = memory_plan(job_of(config, ranks=combination.ranks, gpu=False))
    message = (
        f"{combination.name}: {real:,} bytes live, {planned.tensors:,} planned ({planned.moment}): {planned.parts}"
    )
    print(message)
    return planned.tensors / real - 1, message


@pytest.mark.parametrize("combination", [*SHORT, *PACKED, *FP8], ids=lambda each: each.name)
def test_tensors_alive_at_the_peak(combination, tmp_path):
    off, message = error(combination, tmp_path)
    assert abs(off) < 0.05, message


@pytest.mark.slow
@pytest.mark.parametrize("combination", COMBINATIONS, ids=lambda each: each.name)
def test_tensors_alive_at_the_peak_of_all_combinations(combination, tmp_path):
    off, message = error(combination, tmp_path)
    assert abs(off) < 0.05, message


def test_there_are_24_combinations():
    assert len(set(COMBINATIONS)) == 24
    for name, values in (
        ("model", {"tiny", "smollm2"}),
        ("method", {"full", "lora"}),
        ("stage", {0, 1, 2, 3}),
        ("ranks", {1, 2}),
        ("checkpointing", {False, True}),
        ("kernels", {False, True}),
    ):
        assert {getattr(each, name) for each in COMBINATIONS} == values
    assert len(SHORT) == 2
