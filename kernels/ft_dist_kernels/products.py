"""Sums of matrix products, out = L1 R1 + L2 R2 + ... (+ bias), rounded once where that is also faster.

Shapes: M rows, K contracted, N columns. On a GPU, and on CPUs with bf16 or fp16 matrix instructions, these are the
vendor's GEMMs. An x86 CPU without them runs a 16-bit GEMM 3 to 10 times slower than fp32 (measured: 2048x576x1536 on
one AVX-512 core, fp32 44 ms, bf16 149 ms, fp16 432 ms), so there the operands are widened block by block and the sum
leaves fp32 once. In fp32 oneDNN multiplies where torch would take MKL: 1.05 to 1.4 times faster at 200 to 2,000 rows,
1.1 to 2 times for a vocabulary and few rows (two Zen 4 cores).
"""

import platform
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

# Bounds the widened copies: 16 MiB of a right operand, 256 rows of a left one. Larger blocks were not faster.
_BLOCK_ELEMENTS = 4 << 20
_BLOCK_ROWS = 256
# Fewer columns (an adapter's ranks) or fewer contracted ones: MKL is as fast
_ONEDNN_SIDE = 64


@cache
def _cpu_has(dtype: torch.dtype) -> bool:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    capabilities = torch.cpu.get_capabilities()
    if dtype == torch.bfloat16:
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return bool(capabilities.get("avx512_fp16") or capabilities.get("amx_fp16"))


def widens(tensor: Tensor) -> bool:
    """True where a GEMM in this tensor's dtype is better done in fp32."""
    return tensor.device.type == "cpu" and tensor.element_size() == 2 and not _cpu_has(tensor.dtype)


def matmul(left: Tensor, right: Tensor, plus: Tensor | None = None) -> Tensor:
    """left (M, K) @ right (K, N), plus `plus` (M, N), in their common dtype. Not differentiable."""
    if not takes_onednn(left, right):
        return torch.mm(left, right) if plus is None else torch.addmm(plus, left, right)
    linear = torch.ops.mkldnn._linear_pointwise
    if plus is None:
        return linear(left, right.t(), None, "none", [], "")
    return linear.binary(left, plus, right.t(), None, "add")


def matmul_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    """Writes left @ right into `out`; on CPU `out` should be a tile that stays in cache."""
    if takes_onednn(left, right):
        out.copy_(matmul(left, right))
    else:
        torch.mm(left, right, out=out)


def takes_onednn(left: Tensor, right: Tensor) -> bool:
    """Whether `matmul` of these two goes to oneDNN."""
    return (
        left.device.type == "cpu"
        and left.dtype == right.dtype == torch.float32
        and _has_onednn()
        and min(*left.shape, *right.shape) > 0
        and right.shape[1] >= _ONEDNN_SIDE
        and left.stride(1) == 1
        and 1 in right.stride()
    )


@cache
def _has_onednn() -> bool:
    """Requires AVX-512, for which it was measured, and torch's operator, which Inductor calls."""
    known = hasattr(torch.ops, "mkldnn") and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return known and torch.backends.mkldnn.is_available() and torch.cpu.get_capabilities().get("avx512_f", False)


def sum_products(
    products: Sequence[tuple[Tensor, Tensor]],
    *,
    bias_N: Tensor | None = None,
    out: Tensor | None = None,
    alpha: float = 1.0,
) -> Tensor:
    """alpha * sum of left (M, K) @ right (K, N), plus `bias_N`, plus `out` if given (which may be overwritten).

    All operands and the result share one dtype.
    """
    left, right = products[0]
    if alpha == 1.0 and any(takes_onednn(*product) for product in products):
        return _by_onednn(products, bias_N, out)
    if widens(left):
        target = left.new_empty(left.shape[0], right.shape[1]) if out is None else out
        return _widened(products, bias_N, target, out is not None, alpha)
    if out is None and bias_N is not None:
        out = torch.addmm(bias_N, left, right, alpha=alpha)
    elif out is None:
        out = left.new_empty(left.shape[0], right.shape[1])
        torch.addmm(out, left, right, beta=0, alpha=alpha, out=out)
    else:
        out.addmm_(left, right, alpha=alpha)
        if bias_N is not None:
            out.add_(bias_N)
    for left, right in products[1:]:
        out.addmm_(left, right, alpha=alpha)
    return out


def _by_onednn(products: Sequence[tuple[Tensor, Tensor]], bias_N: Tensor | None, out: Tensor | None) -> Tensor:
    """Wide products first: the narrow ones then add to what is still in cache."""
    for left, right in sorted(products, key=lambda product: -product[0].shape[1]):
        out = out.addmm_(left, right) if out is not None and left.shape[1] < _ONEDNN_SIDE else matmul(left, right, out)
    assert out is not None
    return out if bias_N is None else out.add_(bias_N)


def _widened(
    products: Sequence[tuple[Tensor, Tensor]], bias_N: Tensor | None, out: Tensor, accumulate: bool, alpha: float
) -> Tensor:
    rows, columns = out.shape
    contracted = sum(left.shape[1] for left, _ in products)
    width = max(1, min(columns, _BLOCK_ELEMENTS // max(contracted, 1)))
    for begin in range(0, columns, width):
        block = slice(begin, min(begin + width, columns))
        rights = [right[:, block].float() for _, right in products]
        bias = None if bias_N is None else bias_N[block].float()
        for top in range(0, rows, _BLOCK_ROWS):
            chunk = slice(top, min(top + _BLOCK_ROWS, rows))
            total = torch.mm(products[0][0][chunk].float(), rights[0])
            for (left, _), right in zip(products[1:], rights[1:], strict=True):
                total.addmm_(left[chunk].float(), right)
            if alpha != 1.0:
                total.mul_(alpha)
            if bias is not None:
                total.add_(bias)
            if accumulate:
                total.add_(out[chunk, block])
            out[chunk, block] = total
    return out


def transposed_product(left_TM: Tensor, right_TN: Tensor, dtype: torch.dtype) -> Tensor:
    """left^T right in `dtype`, accumulated in fp32: a parameter's gradient, contracted over tokens."""
    if left_TM.is_cuda and left_TM.dtype != dtype and dtype == torch.float32:
        return torch.mm(left_TM.t(), right_TN, out_dtype=dtype)
    if left_TM.dtype == dtype and not widens(left_TM):
        return left_TM.t() @ right_TN
    wide = torch.promote_types(torch.float32, dtype)
    total = torch.zeros(left_TM.shape[1], right_TN.shape[1], dtype=wide, device=left_TM.device)
    for top in range(0, left_TM.shape[0], _BLOCK_ROWS):
        chunk = slice(top, top + _BLOCK_ROWS)
        total.addmm_(left_TM[chunk].t().to(wide), right_TN[chunk].to(wide))
    return total.to(dtype)
