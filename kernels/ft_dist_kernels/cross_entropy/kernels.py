"""The softmax step of `linear_cross_entropy` in Triton: one program per row, logits to gradient in place.

First pass: online log-sum-exp in fp32 over blocks of the vocabulary. Second pass: the same blocks once more (from L2:
a row of 128256 bf16 logits is 250 KB) to overwrite each logit by the gradient of the loss over it. Any vocabulary size;
row offsets are int64.

Bytes of a chunk of n rows: 3 n V itemsize (read twice, written once).
Shapes: N labelled tokens, n rows of a chunk, V vocabulary.
"""

# mypy: disallow-incomplete-defs=False

import triton
import triton.language as tl
from torch import Tensor

from ft_dist_kernels.aot import AotCase, Chip
from ft_dist_kernels.chips import chip_of
from ft_dist_kernels.cross_entropy.types import Options, PerToken

# (largest vocabulary block, warps). 16 fp32 values per thread: two passes of loads in flight and no spills.
BLOCKS: dict[Chip, tuple[int, int]] = {
    "sm_80": (8192, 16),
    "sm_90": (8192, 16),
    "sm_100": (8192, 16),
    "gfx942": (8192, 8),
}


@triton.jit
def _tanh(x):
    """Below 0.2 a Taylor polynomial (relative error < 6e-8), where 1 - 2 / (e^2x + 1) would cancel."""
    a = tl.abs(x)
    square = x * x
    small = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 + square * (-17.0 / 315.0))))
    e = tl.exp(-2.0 * a)
    large = (1.0 - e) / (1.0 + e)
    return tl.where(a < 0.2, small, tl.where(x < 0, -large, large))


@triton.jit
def _logits(
    logits_ptr,
    bias_ptr,
    columns,
    inside,
    softcap,
    logit_scale,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """(z, tanh) of a block; outside the vocabulary z is -inf."""
    z = tl.load(logits_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    z *= logit_scale
    t = z
    if HAS_SOFTCAP:
        t = _tanh(z / softcap)
        z = t * softcap
    return tl.where(inside, z, -float("inf")), t


@triton.jit
def softmax_step_kernel(
    logits_ptr,
    labels_ptr,
    weights_ptr,
    bias_ptr,
    loss_ptr,
    nll_ptr,
    correct_ptr,
    row_stride,
    vocabulary,
    softcap,
    logit_scale,
    HAS_WEIGHTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WANT_GRAD: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    label = tl.load(labels_ptr + row)
    valid = (label >= 0) & (label < vocabulary)
    label = tl.where(valid, label, 0)
    z_label, _t_label = _logits(logits_ptr, bias_ptr, label, valid, softcap, logit_scale, HAS_BIAS, HAS_SOFTCAP)

    peak = -float("inf")
    total = 0.0
    for start in range(0, vocabulary, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        inside = columns < vocabulary
        z, _t_block = _logits(logits_ptr, bias_ptr, columns, inside, softcap, logit_scale, HAS_BIAS, HAS_SOFTCAP)
        higher = tl.maximum(peak, tl.max(z, 0))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(z - higher), 0)
        peak = higher
    lse = peak + tl.log(total)

    weight = 1.0
    if HAS_WEIGHTS:
        weight = tl.load(weights_ptr + row).to(tl.float32)
    # A label outside the vocabulary makes its row NaN instead of reading out of bounds.
    weight = tl.where(valid, weight, float("nan"))
    nll = tl.where(valid, lse - z_label, float("nan"))
    tl.store(loss_ptr + row, weight * nll)
    tl.store(nll_ptr + row, nll)
    tl.store(correct_ptr + row, (valid & (z_label >= peak)).to(tl.int32))

    if WANT_GRAD:
        weight *= logit_scale
        for start in range(0, vocabulary, BLOCK_V):
            columns = start + tl.arange(0, BLOCK_V)
            inside = columns < vocabulary
            z, t = _logits(logits_ptr, bias_ptr, columns, inside, softcap, logit_scale, HAS_BIAS, HAS_SOFTCAP)
            p = tl.exp(z - lse)
            grad = (p - tl.where(columns == label, 1.0, 0.0)) * weight
            if HAS_SOFTCAP:
                grad *= 1.0 - t * t
            tl.store(logits_ptr + columns, grad.to(logits_ptr.dtype.element_ty), mask=inside)


def softmax_step_triton(
    logits_nV: Tensor,
    labels_n: Tensor,
    weights_n: Tensor | None,
    bias_V: Tensor | None,
    options: Options,
    out: PerToken,
    *,
    want_grad: bool,
) -> None:
    """Same contract as `softmax_step_torch`."""
    rows, vocabulary = logits_nV.shape
    if rows == 0:
        return
    block, warps = _block(chip_of(logits_nV.device), vocabulary)
    softmax_step_kernel[(rows,)](
        logits_nV, labels_n, weights_n, bias_V, out.loss, out.nll, out.correct,
        logits_nV.stride(0), vocabulary,
        float(options.softcap or 0.0), float(options.logit_scale),
        HAS_WEIGHTS=weights_n is not None, HAS_BIAS=bias_V is not None, HAS_SOFTCAP=options.softcap is not None,
        WANT_GRAD=want_grad, BLOCK_V=block, num_warps=warps,
    )  # fmt: skip


def _block(chip: Chip, vocabulary: int) -> tuple[int, int]:
    largest, warps = BLOCKS[chip]
    block = min(largest, triton.next_power_of_2(vocabulary))
    return block, max(1, warps * block // largest)


def aot_cases(chip: Chip) -> list[AotCase]:
    """Llama 3 (V=128256), Gemma 3 (V=262144, also with Gemma 2's soft-cap), and all options enabled."""
    cases = []
    for name, vocabulary, extras in (
        ("llama3", 128256, False),
        ("gemma", 262144, False),
        ("gemma-all-options", 262144, True),
        ("smollm", 49152, False),
    ):
        block, warps = _block(chip, vocabulary)
        pointers = {
            "logits_ptr": "*bf16",
            "labels_ptr": "*i64",
            "weights_ptr": "*fp32" if extras else "constexpr",
            "bias_ptr": "*bf16" if extras else "constexpr",
            "loss_ptr": "*fp32",
            "nll_ptr": "*fp32",
            "correct_ptr": "*i32",
        }
        scalars = {"row_stride": "i32", "vocabulary": "i32"}
        floats = dict.fromkeys(("softcap", "logit_scale"), "fp32")
        constexprs = {
            "HAS_WEIGHTS": extras,
            "HAS_BIAS": extras,
            "HAS_SOFTCAP": extras,
            "WANT_GRAD": True,
            "BLOCK_V": block,
        }
        missing = {key: None for key, kind in pointers.items() if kind == "constexpr"}
        cases.append(
            AotCase(
                name=f"linear_cross_entropy/{name}",
                kernel=softmax_step_kernel,
                signature=pointers | scalars | floats | dict.fromkeys(constexprs, "constexpr"),
                constexprs=constexprs | missing,
                divisible=tuple(key for key in (*pointers, *scalars) if key not in missing),
                options={"num_warps": warps},
            )
        )
    return cases
