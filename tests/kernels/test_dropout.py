"""The dropout mask: exact values, agreement of both forms, and statistics."""

import math

import pytest
import torch
from ft_dist_kernels.dropout.op import (
    draw_seed,
    dropout_reference,
    effective_p,
    keep_bits,
    keep_mask,
    masked_copy,
    mix_seed,
    threshold,
)

MASK_32, MASK_64 = (1 << 32) - 1, (1 << 64) - 1


def draw(row, column, seed):
    """The documented formula on Python's integers."""
    z = (row * 0x9E3779B97F4A7C15 + mix_seed(seed)) & MASK_64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK_64
    z ^= z >> 31
    h = (((column // 2) * 0x9E3779B9) & MASK_32) ^ (z & MASK_32)
    h = (((h ^ (h >> 16)) * 0x7FEB352D) & MASK_32) ^ (z >> 32)
    h = ((h ^ (h >> 15)) * 0x846CA68B) & MASK_32
    h ^= h >> 16
    return (h >> 16 if column % 2 else h) & 0x7FFF


@pytest.mark.parametrize("seed", [0, 1, -7, 2**62 + 12345, 2**70])
def test_the_documented_formula(seed):
    rows, columns, p = 9, 13, 0.3
    expected = torch.tensor([[draw(r, c, seed) >= threshold(p) for c in range(columns)] for r in range(rows)])
    assert torch.equal(keep_mask(rows, columns, p=p, seed=seed), expected)


def test_rows_beyond_32_bits_and_any_choice_of_rows():
    rows = torch.tensor([5, 2**33 + 5, 2**40])
    bits = keep_bits(rows, 64, 0.5, 3, torch.bfloat16)
    assert torch.equal(bits[0].bool(), keep_mask(6, 64, p=0.5, seed=3)[5])
    assert not torch.equal(bits[0], bits[1])
    assert [bool(bit) for bit in bits[2]] == [draw(2**40, c, 3) >= threshold(0.5) for c in range(64)]


@pytest.mark.interpreter
@pytest.mark.parametrize("columns", [64, 51])
def test_triton_has_the_same_bits(columns):
    """S = (X * M) A^T with X of ones and A the identity is the mask, over several programs."""
    from ft_dist_kernels.lora.torch_form import Member
    from ft_dist_kernels.lora.triton_form import down

    eye, ones = torch.eye(columns), torch.ones(150, columns)
    for seed, p in ((0, 0.1), (-3, 0.5), (2**61 + 9, 0.9)):
        written = down(ones, [eye], [Member(0, columns, 1.0, p, seed)])
        assert torch.equal(written.bool(), keep_mask(150, columns, p=p, seed=seed))


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_mean_overall_by_row_and_by_column(p):
    """Within five standard deviations overall, and with the spread of independent draws in rows and columns."""
    rows, columns = 1024, 768
    mask = keep_mask(rows, columns, p=p, seed=42).double()
    q = 1 - effective_p(p)
    assert abs(mask.mean() - q) < 5 * math.sqrt(q * (1 - q) / mask.numel())
    for means, count in ((mask.mean(0), rows), (mask.mean(1), columns)):
        ratio = means.var() / (q * (1 - q) / count)
        assert abs(ratio - 1) < 5 * math.sqrt(2 / means.numel())


@pytest.mark.parametrize("shift", [(0, 1), (0, 2), (1, 0), (1, 1), (7, 0), (0, 64)])
def test_neighbours_are_uncorrelated(shift):
    mask = keep_mask(1024, 768, p=0.5, seed=7).double() * 2 - 1
    moved = mask[shift[0] :, shift[1] :]
    product = mask[: moved.shape[0], : moved.shape[1]] * moved
    assert abs(product.mean()) < 5 / math.sqrt(product.numel())


@pytest.mark.parametrize("other", [1, 2, 42 + 2**32, -42])
def test_seeds_are_uncorrelated(other):
    one, two = (keep_mask(512, 512, p=0.5, seed=seed).double() * 2 - 1 for seed in (42, other))
    assert abs((one * two).mean()) < 5 / 512


def test_thresholds_nest_in_p():
    """The same draw decides for every p: a smaller p keeps everything that a larger p keeps."""
    strict, loose = (keep_mask(64, 64, p=p, seed=1) for p in (0.6, 0.2))
    assert not (strict & ~loose).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_masked_copy_zeroes_even_non_finite_values(dtype):
    x = torch.full((4, 7), float("inf"), dtype=dtype)
    keep = keep_bits(torch.arange(4), 7, 0.5, 5, dtype)
    masked = masked_copy(x, keep)
    assert torch.equal(masked.isinf(), keep.bool())
    assert not masked[~keep.bool()].any()


def test_reference_scales_the_survivors():
    x = torch.ones(64, 64)
    y = dropout_reference(x, p=0.1, seed=2)
    assert y.unique().tolist() == pytest.approx([0.0, 1 / (1 - effective_p(0.1))])


def test_drawn_seeds_follow_the_generator():
    torch.manual_seed(5)
    first = [draw_seed(), draw_seed()]
    torch.manual_seed(5)
    assert [draw_seed(), draw_seed()] == first
    assert first[0] != first[1]


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, float("nan")])
def test_probabilities_out_of_range_are_refused(p):
    with pytest.raises(ValueError, match="0 <= p < 1"):
        threshold(p)
