"""The console line of a step."""

import pytest

from ft_dist.observe.console import Console

STEP = {"step": 3, "loss": 1.25, "lr": 1e-4, "grad_norm": 0.5, "tokens_per_s": 1234.0}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, "step 3/10  loss 1.2500  lr 1.00e-04  grad 0.500  1,234 tok/s  ETA 9s"),
        ({"grad_norm": None}, "step 3/10  loss 1.2500  lr 1.00e-04  grad not finite: skipped  1,234 tok/s  ETA 9s"),
        (
            {"loss": None, "grad_norm": None},
            "step 3/10  loss not finite  lr 1.00e-04  grad not finite: skipped  1,234 tok/s  ETA 9s",
        ),
    ],
    ids=["usual", "gradient", "loss"],
)
def test_a_step_in_one_line(capsys, changed, expected):
    Console(enabled=True).step(STEP | changed, total_steps=10, eta_s=9, mfu=None, last=True)
    assert capsys.readouterr().out.strip() == expected
