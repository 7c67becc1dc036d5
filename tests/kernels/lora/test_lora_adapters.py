"""Several adapters in one call, each row with its own, against one dense product a row."""

import pytest
import torch
from ft_dist_kernels.dropout.op import effective_p, keep_mask
from ft_dist_kernels.lora.adapters import LoraAdapter, lora_linear_adapters
from ft_dist_kernels.quantised.nf4 import dequantize_nf4, quantize_nf4

from tests.kernels.parity import check_parity

TOKENS, INNER, OUTER, RANKS = 41, 24, 40, (4, 7, 3)
PS = (0.0, 0.3, 0.6)
ROWS = torch.randint(-1, 2, (TOKENS,), generator=torch.Generator().manual_seed(4))  # the third adapter is never used


def inputs_in(dtype, adapter_dtype=None):
    generator = torch.Generator().manual_seed(0)

    def normal(*size, std=1.0, to=dtype):
        return (torch.randn(size, generator=generator) * std).to(to)

    tensors = {"x": normal(TOKENS, INNER), "weight": normal(OUTER, INNER, std=0.2), "bias": normal(OUTER)}
    for k, rank in enumerate(RANKS):
        tensors[f"a{k}"] = normal(rank, INNER, std=0.2, to=adapter_dtype or dtype)
        tensors[f"b{k}"] = normal(OUTER, rank, to=adapter_dtype or dtype)
    return tensors


def ours(x, weight, bias, **factors):
    adapters = [LoraAdapter(factors[f"a{k}"], factors[f"b{k}"], 0.5 + k, PS[k], 90 + k) for k in range(len(RANKS))]
    return (lora_linear_adapters(x, weight, adapters, ROWS, bias=bias),)


def eager(x, weight, bias, **factors):
    y = torch.nn.functional.linear(x, weight, bias)
    for k in range(len(RANKS)):
        mask = keep_mask(TOKENS, INNER, p=PS[k], seed=90 + k) if PS[k] else torch.ones(TOKENS, INNER)
        delta = (x * mask / (1 - effective_p(PS[k]))).to(x.dtype) @ factors[f"a{k}"].t() @ factors[f"b{k}"].t()
        y = y + (0.5 + k) * delta * (k == ROWS)[:, None]
    return (y,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parity(dtype):
    grad = torch.randn(TOKENS, OUTER).to(dtype)
    check_parity(ours, eager, inputs_in(dtype), upstream=(grad,))


def test_leading_shape_nf4_and_rows_without_adapter():
    tensors = inputs_in(torch.float32)
    packed = quantize_nf4(tensors["weight"])
    dense = dequantize_nf4(packed, torch.float32)
    adapters = [LoraAdapter(tensors["a0"], tensors["b0"])]
    x, rows = tensors["x"][:40].view(2, 20, INNER), torch.full((2, 20), -1, dtype=torch.int32)
    y = lora_linear_adapters(x, packed, adapters, rows)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, dense))


@pytest.mark.parametrize(
    "rows, message",
    [(torch.zeros(3, dtype=torch.int64), r"of shape \(41,\)"), (torch.full((41,), 5), "from 5 to 5; 3 adapters")],
)
def test_errors_name_the_value(rows, message):
    tensors = inputs_in(torch.float32)
    adapters = [LoraAdapter(tensors[f"a{k}"], tensors[f"b{k}"]) for k in range(3)]
    with pytest.raises(ValueError, match=message):
        lora_linear_adapters(tensors["x"], tensors["weight"], adapters, rows)
