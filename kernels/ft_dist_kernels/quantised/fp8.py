"""Linear layers whose frozen weight is stored in FP8 in both orientations, for 8-bit products in forward and backward.

    Y  = (Xq  Wq^T) * s_x s_w^T      Wq: W, one scale per output            Xq:  X, one scale per token
    dX = (dYq Vq^T) * s_dy s_v^T     Vq: W^T, one scale per input           dYq: dY, one scale per token

A row r is stored as codes q = e4m3(r / s) with s = max|r| / 448, where 448 is e4m3's largest number. The largest
element, which weighs most in every product, is then exact: with powers of two as scales, the error of SmolLM2's q and k
was 15 to 28% larger, that of its other layers 3 to 7%. The error of a code is at most 2^-4 of its element, and 2^-10 s
below 2^-6 s. A row with an infinity or NaN gets the scale NaN, so every result is NaN; one below 2^-64 gets the scale
of 2^-64.

Weights that read the same x share one matrix: X is quantised once, and one product gives their dX. A weight takes 2
bytes per element, like bf16, and 4 on CPU, where bf16 stores the codes exactly.

On NVIDIA GPUs from compute capability 8.9 on, `torch._scaled_mm` multiplies. It accumulates in the tensor cores'
accumulators, which keep 13 fractional bits (`use_fast_accum`): 2^9 times finer than the codes, while promotion to fp32
is slower (pytorch/pytorch#147971). A CPU multiplies the same codes in bf16 or fp32 with fp32 sums, slower than without
FP8: for tests and to try FP8 training. In bf16 it rounds before and after the scales, where a GPU rounds once.

Shapes: T tokens, I in, O out; M rows, K contracted, N columns. Sources: FP8 formats (arXiv 2209.05433); row-wise scales
as in FBGEMM; both passes of training in e4m3 as in DeepSeek-V3 (arXiv 2412.19437).
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ft_dist_kernels.backend import Backend, use_triton
from ft_dist_kernels.products import sum_products
from ft_dist_kernels.quantised.fp8_format import E4M3, LARGEST, LEAST_MAXIMUM, MAX_ROW, SIDE, FP8Matrix, FP8Weight


def fp8_reason_not(device: torch.device) -> str | None:
    """Why a device cannot multiply in FP8; None if it can, or if the CPU emulates it."""
    if device.type == "cpu":
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return "FP8 runs on NVIDIA GPUs only"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {major}.{minor}; FP8 needs 8.9 (L40S, RTX 4090, H100)"
    return _refusal_of_product(device)


@cache
def _refusal_of_product(device: torch.device) -> str | None:
    """PyTorch's error for a small product: some versions lack row-wise scales on some chips."""
    try:
        codes = torch.zeros(SIDE, SIDE, dtype=torch.float32, device=device).to(E4M3)
        scale = torch.ones(SIDE, dtype=torch.float32, device=device)
        scaled_product(codes, scale, codes, scale, torch.bfloat16)
    except RuntimeError as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"torch {torch.__version__} has no FP8 product for {torch.cuda.get_device_name(device)}: {first}"
    return None


def takes_fp8(out_features: int, in_features: int) -> bool:
    """Whether a weight of this shape can be stored in FP8."""
    return out_features % SIDE == 0 and in_features % SIDE == 0 and min(out_features, in_features) > 0


def hold_fp8(weights: Sequence[Tensor]) -> list[FP8Weight]:
    """Quantises float weights (O_i, I) that read the same x into one matrix.

    Raises ValueError for unsupported shapes and for weights that are not finite.
    """
    for weight in weights:
        if weight.dim() != 2 or weight.shape[1] != weights[0].shape[1] or not takes_fp8(*weight.shape):
            raise ValueError(
                f"weight has shape {tuple(weight.shape)}; FP8 needs (out, in) in multiples of {SIDE}, and the same "
                "width in a group. Leave the weight in bf16."
            )
    w_OI = weights[0].detach() if len(weights) == 1 else torch.cat([weight.detach() for weight in weights])
    by_output, output_scale = quantize_rows([w_OI])
    if bool(output_scale.isnan().any()):
        raise ValueError("weight holds values that are not finite. Load it again: its file may be damaged.")
    by_input, input_scale = quantize_rows([w_OI.t().contiguous()])
    codes = torch.bfloat16 if w_OI.device.type == "cpu" else E4M3
    matrix = FP8Matrix(by_output.to(codes), output_scale, by_input.to(codes), input_scale)
    held, begin = [], 0
    for weight in weights:
        held.append(FP8Weight(matrix, begin, begin + weight.shape[0]))
        begin += weight.shape[0]
    return held


def quantize_rows(parts: Sequence[Tensor], *, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """Codes e4m3 (T, sum of K) and scales fp32 (T,) of up to three concatenated tensors (T, K), fp32, bf16 or fp16.

    A row has one scale for all parts.
    """
    if parts[0].shape[0] and use_triton(parts[0], backend):
        from ft_dist_kernels.quantised import fp8_kernels as kernels

        return kernels.quantize(parts)
    return quantize_rows_reference(parts)


def quantize_rows_reference(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The formula in plain PyTorch."""
    x_TK = parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)
    largest_T = x_TK.abs().amax(1).float().clamp_min(LEAST_MAXIMUM)
    scale_T = (largest_T / LARGEST).masked_fill(~largest_T.isfinite(), float("nan"))
    scaled_TK = x_TK.to(torch.float32, copy=True).mul_((LARGEST / largest_T)[:, None])
    return scaled_TK.to(E4M3), scale_T


def scaled_product(
    codes_MK: Tensor, scale_M: Tensor, other_NK: Tensor, other_scale_N: Tensor, dtype: torch.dtype
) -> Tensor:
    """(codes * scale) @ (other * other_scale)^T in `dtype` (M, N), which on a GPU is bf16."""
    if codes_MK.is_cuda:
        return torch._scaled_mm(
            codes_MK,
            other_NK.t(),
            scale_a=scale_M[:, None],
            scale_b=other_scale_N[None, :],
            out_dtype=dtype,
            use_fast_accum=True,
        )
    wide = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    product_MN = sum_products([(codes_MK.to(wide), other_NK.to(wide).t())]).float()
    return product_MN.mul_(scale_M[:, None]).mul_(other_scale_N).to(dtype)


def _whole_matrix(weights: Sequence[FP8Weight]) -> bool:
    """Whether these are all the weights of one matrix, in order."""
    begins = [0, *(weight.end for weight in weights)]
    matrix = weights[0].matrix
    return (
        all(weight.matrix is matrix and weight.begin == begin for weight, begin in zip(weights, begins, strict=False))
        and begins[-1] == matrix.by_output.shape[0]
    )


def fp8_forward(x_TI: Tensor, weights: Sequence[FP8Weight], *, backend: Backend = "auto") -> list[Tensor]:
    """x W^T of every weight, (T, O_i) in x's dtype; x is quantised once.

    One product per weight: as columns of one product, an output kept for backward would keep the others alive.
    """
    codes_TI, scale_T = quantize_rows([x_TI], backend=backend)
    outputs = []
    for matrix, begin, end in weights:
        rows_OI, rows_scale_O = matrix.by_output[begin:end], matrix.output_scale[begin:end]
        outputs.append(scaled_product(codes_TI, scale_T, rows_OI, rows_scale_O, x_TI.dtype))
    return outputs


def fp8_backward(dys: Sequence[Tensor], weights: Sequence[FP8Weight], *, backend: Backend = "auto") -> Tensor:
    """The sum over weights of dY_i W_i, (T, I) in the dtype of dY; dY_i is (T, O_i) with columns of unit stride."""
    if len(weights) == 1 or (_whole_matrix(weights) and sum(dy.shape[1] for dy in dys) <= MAX_ROW):
        columns_IO, scale_I = weights[0].matrix.by_input, weights[0].matrix.input_scale
        if not _whole_matrix(weights):
            columns_IO = columns_IO[:, weights[0].begin : weights[0].end].contiguous()
        codes_TO, scale_T = quantize_rows(dys, backend=backend)
        return scaled_product(codes_TO, scale_T, columns_IO, scale_I, dys[0].dtype)
    total_TI = fp8_backward(dys[:1], weights[:1], backend=backend)
    for dy_TO, weight in zip(dys[1:], weights[1:], strict=True):
        total_TI.add_(fp8_backward([dy_TO], [weight], backend=backend))
    return total_TI


def check_fp8_input(x: Tensor, dtype: torch.dtype) -> None:
    """Raises ValueError if the product would not have `dtype`."""
    if x.is_cuda and dtype != torch.bfloat16:
        raise ValueError(f"x is {dtype} and the weight FP8; on a GPU their product is bf16. Cast x to bf16.")


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: FP8Weight, x_TI: Tensor, bias: Any) -> Tensor:
        ctx.weight, ctx.bias_dtype = weight, None if bias is None else bias.dtype
        (y_TO,) = fp8_forward(x_TI, [weight])
        return y_TO if bias is None else y_TO.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TO: Tensor) -> Any:
        dx_TI = fp8_backward([dy_TO.contiguous()], [ctx.weight]) if ctx.needs_input_grad[1] else None
        d_bias = dy_TO.sum(0, dtype=torch.float32).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return None, dx_TI, d_bias


@torch._disable_dynamo
def fp8_linear(x: Tensor, weight: FP8Weight, bias: Tensor | None = None) -> Tensor:
    """x W^T + b of a frozen weight: x (..., I), bf16 on a GPU and any float dtype on CPU, to (..., O) in x's dtype.

    Raises ValueError for unsupported shapes and dtypes.
    """
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x has {x.shape[-1]} features; a weight of shape {weight.shape} reads {weight.shape[1]}.")
    check_fp8_input(x, x.dtype)
    y_TO = _Fp8Linear.apply(weight, x.reshape(-1, x.shape[-1]), bias)
    return y_TO.view(*x.shape[:-1], y_TO.shape[1])
