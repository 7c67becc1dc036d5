"""NF4: the layout, both forms of dequantisation, and quantisation's error."""

import itertools
import math

import pytest
import torch
from ft_dist_kernels.quantised.nf4 import (
    dequantize_nf4,
    dequantize_nf4_reference,
    nested_code,
    quantize_nf4,
)
from ft_dist_kernels.quantised.nf4_format import BLOCK, CODE
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.parity import BACKENDS, poisoned

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def random_weight(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(64, 64), (37, 41), (1, 5), (300, 192), (0, 7)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dequantisation_is_the_formula(backend, dtype, shape, double_quant):
    if backend == "triton" and dtype is torch.bfloat16:
        pytest.skip("the interpreter truncates fp32 to bf16 where hardware rounds")
    packed = quantize_nf4(random_weight(*shape), double_quant=double_quant)
    with poisoned():
        dense = dequantize_nf4(packed, dtype, backend=backend)
    assert dense.shape == shape
    assert dense.dtype is dtype
    assert torch.equal(dense, dequantize_nf4_reference(packed, dtype))


def test_values_of_the_code_come_back_exactly():
    weight = torch.tensor(CODE).repeat(8).view(2, 64) * torch.tensor([[0.5], [3.0]])
    packed = quantize_nf4(weight, double_quant=False)
    assert torch.equal(dequantize_nf4(packed, torch.float32), weight)
    assert packed.packed[0] == 0x01, "the first element belongs in the high half"


def test_a_block_of_zeros_stays_zero():
    assert not dequantize_nf4(quantize_nf4(torch.zeros(3, 64), double_quant=False), torch.float32).any()


def test_the_error_is_that_of_the_nearest_code_values():
    """Without double quantisation, no error exceeds half the widest gap; with it, 1% of absmax more."""
    weight = random_weight(128, 256)
    absmax = weight.view(-1, BLOCK).abs().amax(1).repeat_interleave(BLOCK).view_as(weight)
    gap = max(b - a for a, b in itertools.pairwise(CODE)) / 2
    single = (dequantize_nf4(quantize_nf4(weight, double_quant=False), torch.float32) - weight).abs() / absmax
    double = (dequantize_nf4(quantize_nf4(weight), torch.float32) - weight).abs() / absmax
    assert single.max() <= gap + 1e-6
    assert double.max() <= gap + 0.02


def test_nested_code_is_the_signed_dynamic_map():
    """Spot values of the 8-bit dynamic code, and its structure: 127 of each sign, 0 and 1."""
    code = nested_code(torch.device("cpu"))
    assert code.numel() == 256
    assert bool((code[1:] > code[:-1]).all())
    assert torch.equal(code[:127].flip(0).neg(), code[128:255])
    assert code[127] == 0
    assert code[255] == 1
    assert float(code[128]) == pytest.approx(5.5e-7)
    assert float(code[254]) == pytest.approx(0.99296875)


def test_sizes_of_the_layout():
    packed = quantize_nf4(random_weight(130, 127))
    count = 130 * 127
    assert packed.packed.numel() == math.ceil(count / 2)
    assert packed.absmax.numel() == math.ceil(count / 64)
    assert packed.nested_absmax.numel() == math.ceil(math.ceil(count / 64) / 256)
    assert packed.packed.dtype is packed.absmax.dtype is torch.uint8


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 90), columns=st.integers(1, 90), double_quant=st.booleans())
def test_any_shape(rows, columns, double_quant):
    packed = quantize_nf4(random_weight(rows, columns), double_quant=double_quant)
    assert torch.equal(dequantize_nf4(packed, torch.bfloat16), dequantize_nf4_reference(packed, torch.bfloat16))


def test_errors_name_the_value():
    with pytest.raises(ValueError, match="3 dimensions"):
        quantize_nf4(torch.zeros(2, 2, 2))
    packed = quantize_nf4(random_weight(8, 64))
    with pytest.raises(ValueError, match="absmax holds 7 values"):
        dequantize_nf4(packed._replace(absmax=packed.absmax[:7]), torch.float32)
