"""Ours and the peers do the same work, each on its own fast path."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks.kernels import parity
from benchmarks.kernels.cases import TINY, cases_of
from benchmarks.kernels.harness import Case, errors
from benchmarks.training import pair, side


@pytest.mark.parametrize("samples", [1, 3])
def test_hugging_face_masks_only_where_rows_hold_several_samples(samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    attention = F.scaled_dot_product_attention

    def spy(*arguments: Any, **named: Any) -> torch.Tensor:
        seen.append(named)
        return attention(*arguments, **named)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    options = side.parse(["hf", "--model", "tiny", "--tokens", "32", "--samples", str(samples), "--method", "full"])
    model = side.plain_model(options)
    forward = side.hugging_face_forward(model, packed=options.samples > 1)
    loss = forward(side.rows(options))
    assert [(named["attn_mask"] is None, named["is_causal"]) for named in seen] == 2 * [(samples == 1, samples == 1)]
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    ours = side.our_forward(side.plain_model(options), options)(side.rows(options))
    torch.testing.assert_close(loss, ours, rtol=1e-5, atol=0)


def test_a_side_that_fails_keeps_its_output() -> None:
    failed = pair.run("hf", ["--model", "no-such-shape"], limit_s=100)
    assert failed["failed"].startswith("KeyError")
    assert "in plain_model" in failed["stderr"]


def _attention() -> Case:
    return cases_of(TINY, 64)["segment_attention"][0]()


def test_a_zero_gradient_is_compared_with_its_natural_scale() -> None:
    """With one token, attention's queries have a gradient of 0; the rest of a cancellation is not an error of 100%."""
    case = _attention()
    exact = case.ours

    def rounded(**inputs: Any) -> torch.Tensor:
        y = exact(**inputs)
        return y + 1e-7 * (inputs["q"].sum() - inputs["q"].sum().detach())

    case.ours = rounded
    case.error_tokens = 1
    assert errors(case, torch.float32, "cpu")["ours"] < 1e-5
    case.ours = lambda **inputs: exact(**inputs) + 0.01 * (inputs["q"].sum() - inputs["q"].sum().detach())
    assert errors(case, torch.float32, "cpu")["ours"] > 1e-3, "a gradient where none belongs is seen"


def test_different_bits_pass_only_where_cudnn_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    case = _attention()
    exact, calls = case.ours, iter(range(1000))
    case.ours = lambda **inputs: exact(**inputs) * (1 + 0.003 * (next(calls) % 2))
    row = parity.check(case, 8, "cpu")
    assert row["ours"] <= 2 * row["eager"]
    assert (row["bit_equal"], row["cudnn"], row["passed"]) == (False, False, False)
    monkeypatch.setattr(parity, "ran_cudnn", lambda *_: True)
    row = parity.check(case, 8, "cpu")
    assert (row["bit_equal"], row["cudnn"], row["passed"]) == (False, True, True)


def test_a_case_that_raises_is_a_row_and_the_others_run() -> None:
    case = _attention()

    def broken(**inputs: Any) -> torch.Tensor:
        raise RuntimeError("illegal memory access")

    case.ours = broken
    row = parity.check(case, 8, "cpu")
    assert not row["passed"]
    assert row["failed"] == "RuntimeError: illegal memory access"
