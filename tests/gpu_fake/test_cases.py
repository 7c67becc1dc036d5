"""Everything a GPU would run compiles and is on the GPU: kernels at all lengths, families in all methods."""

from collections.abc import Callable
from typing import Any

import pytest
from ft_dist_kernels.backend import HAS_TRITON

from ft_dist.model.families import FAMILIES
from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="no Triton here: its wheels exist for Linux only")

# about equal work for two workers
OPS = (
    ("lora_linear", "lora_extended"),
    ("linear_cross_entropy", "rms_norm", "swiglu", "geglu", "rope", "segment_attention", "nf4", "fp8_linear"),
)
FAMILIES_TOGETHER = (("llama", "mistral"), ("qwen2", "qwen3"), ("gemma2", "phi3"), ("gemma3", "gemma3_text"))
TRITON_36 = ROOT / ".venv" / "triton-3.6.0"


def failures(rows: list[dict[str, Any]], *names: str) -> list[str]:
    return [" ".join([*(str(row[name]) for name in names), row["error"]]) for row in rows if row["error"]]


def test_every_op_and_family_is_here() -> None:
    from benchmarks.kernels import cases

    assert sorted(op for group in OPS for op in group) == sorted(cases.OPS)
    assert sorted(family for group in FAMILIES_TOGETHER for family in group) == sorted(FAMILIES)


@pytest.mark.parametrize("ops", OPS, ids=" ".join)
def test_kernels_compile(ops: tuple[str, ...], simulated: Callable[..., Any]) -> None:
    assert failures(simulated("kernel_cases", *ops), "case", "tokens") == []


@pytest.mark.parametrize("ops", OPS, ids=" ".join)
def test_kernels_compile_with_the_triton_of_gpu_machines(ops: tuple[str, ...], simulated: Callable[..., Any]) -> None:
    if not (TRITON_36 / ".done").exists():
        pytest.skip(f"{TRITON_36} is not there: make gpu-fake-36 fetches it")
    rows = simulated("kernel_cases", *ops, first=str(TRITON_36))
    assert {row["triton"] for row in rows} == {"3.6.0"}
    assert failures(rows, "case", "tokens") == []


@pytest.mark.parametrize("families", FAMILIES_TOGETHER, ids=" ".join)
def test_families_train(families: tuple[str, ...], simulated: Callable[..., Any]) -> None:
    """Packed rows, then a dummy micro-batch, in every method."""
    assert failures(simulated("family_cases", *families), "family", "method") == []


@pytest.mark.parametrize("ranks", [1, 2])
def test_zero_stages_train(ranks: int, simulated: Callable[..., Any]) -> None:
    """The engine is built and steps at every ZeRO stage."""
    rows = simulated(
        "family_cases", "llama", "--stages", "1", "2", "3", "--ranks", str(ranks), "--methods", "full", "lora"
    )
    assert [row["stage"] for row in rows] == [1, 1, 2, 2, 3, 3]
    assert failures(rows, "stage", "method") == []
