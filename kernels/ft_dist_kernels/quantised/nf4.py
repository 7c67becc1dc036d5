"""4-bit NormalFloat weights in bitsandbytes's layout, to bf16 and back.

    w[i] = CODE[q[i]] * absmax[i // 64]
    absmax[j] = NESTED_CODE[absmax_q[j]] * nested_absmax[j // 256] + nested_offset        (double quantisation)

Two elements share a byte of `packed`: the first in the high half. The weight is read row by row, so a block may span
two rows. Products are computed in fp32 and rounded once to the requested dtype, as bitsandbytes does.

Shapes: N elements, O out, I in. Sources: QLoRA (arXiv 2305.14314) for NF4 and double quantisation; the 8-bit dynamic
code is "8-bit Optimizers via Block-wise Quantization" (arXiv 2110.02861); layout as bitsandbytes 0.43 and later stores
it (`weight`, `weight.absmax`, `weight.nested_absmax`, `nested_offset`).
"""

import math
from functools import cache

import torch
from torch import Tensor

from ft_dist_kernels.backend import Backend, use_triton
from ft_dist_kernels.quantised.nf4_format import BLOCK, CODE, NESTED_BLOCK, NF4Weight


@cache
def nested_code(device: torch.device) -> Tensor:
    """The 256 values of the signed 8-bit dynamic code, ascending: seven decades of linear fractions, 0 and 1."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1.0, 2**exponent + 1, dtype=torch.float32)
        middles = ((edges[:-1] + edges[1:]) / 2.0) * 10.0 ** (exponent - 6)
        values += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@cache
def _code(device: torch.device) -> Tensor:
    return torch.tensor(CODE, dtype=torch.float32, device=device)


def _blocks_of(flat_N: Tensor, size: int) -> Tensor:
    """(blocks, size), the last one padded with zeros."""
    blocks = math.ceil(flat_N.numel() / size)
    return torch.nn.functional.pad(flat_N, (0, blocks * size - flat_N.numel())).view(blocks, size)


def _nearest(blocks: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """(index of the nearest code value of every element, scaled by its block's largest magnitude; those magnitudes)."""
    absmax = blocks.abs().amax(1)
    scaled = blocks / absmax.masked_fill(absmax == 0, 1.0)[:, None]
    return torch.bucketize(scaled, (code[1:] + code[:-1]) / 2).to(torch.uint8), absmax


def quantize_nf4(weight: Tensor, *, double_quant: bool = True) -> NF4Weight:
    """Quantises a 2-D float weight. Raises ValueError for another number of dimensions."""
    if weight.dim() != 2:
        raise ValueError(f"weight has {weight.dim()} dimensions; NF4 needs 2 (out, in). Reshape it first.")
    flat = weight.detach().float().reshape(-1)
    index, absmax = _nearest(_blocks_of(flat, BLOCK), _code(weight.device))
    pairs = _blocks_of(index.view(-1)[: flat.numel()], 2)
    packed = (pairs[:, 0] << 4) | pairs[:, 1]
    shape = (weight.shape[0], weight.shape[1])
    if not double_quant:
        return NF4Weight(packed, absmax, None, None, shape)
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    nested, nested_absmax = _nearest(_blocks_of(absmax - offset, NESTED_BLOCK), nested_code(weight.device))
    return NF4Weight(packed, nested.view(-1)[: absmax.numel()].clone(), nested_absmax, offset, shape)


def _dense_absmax(weight: NF4Weight) -> Tensor:
    if weight.nested_absmax is None:
        return weight.absmax
    scale = weight.nested_absmax.repeat_interleave(NESTED_BLOCK)[: weight.absmax.numel()]
    return nested_code(weight.absmax.device)[weight.absmax.int()] * scale + weight.nested_offset


def dequantize_nf4_reference(weight: NF4Weight, dtype: torch.dtype) -> Tensor:
    """The formula in plain PyTorch: (O, I) in `dtype`."""
    count = weight.shape[0] * weight.shape[1]
    index = torch.stack((weight.packed >> 4, weight.packed & 15), dim=1).view(-1)[:count]
    absmax = _dense_absmax(weight).repeat_interleave(BLOCK)[:count]
    return (_code(weight.packed.device)[index.int()] * absmax).to(dtype).view(weight.shape)


def _dequantize_torch(weight: NF4Weight, dtype: torch.dtype) -> Tensor:
    """Byte by byte: one lookup in a table of pairs gives two elements."""
    count = weight.shape[0] * weight.shape[1]
    code = _code(weight.packed.device)
    byte = torch.arange(256, device=code.device)
    pairs = torch.stack((code[byte >> 4], code[byte & 15]), dim=1)
    absmax = _dense_absmax(weight)
    out = torch.empty(absmax.numel() * BLOCK, dtype=dtype, device=code.device)
    step = 1 << 13  # blocks at a time: 2 MiB of fp32 scratch
    for begin in range(0, absmax.numel(), step):
        scale = absmax[begin : begin + step, None]
        bytes_ = weight.packed[begin * BLOCK // 2 : (begin + step) * BLOCK // 2].int()
        values = pairs.index_select(0, bytes_).view(-1)
        if values.numel() < scale.numel() * BLOCK:
            values = _blocks_of(values, BLOCK).view(-1)
        torch.mul(values.view(-1, BLOCK), scale, out=values.view(-1, BLOCK))
        out[begin * BLOCK : begin * BLOCK + values.numel()] = values
    return out[:count].view(weight.shape)


def dequantize_nf4(weight: NF4Weight, dtype: torch.dtype, *, backend: Backend = "auto") -> Tensor:
    """The dense (O, I) weight in `dtype` (fp32, bf16 or fp16).

    Raises ValueError if the tensors' sizes do not match `shape`.
    """
    count = weight.shape[0] * weight.shape[1]
    for name, tensor, size in (("packed", weight.packed, 2), ("absmax", weight.absmax, BLOCK)):
        if tensor.numel() != math.ceil(count / size):
            raise ValueError(
                f"{name} holds {tensor.numel()} values; a {weight.shape[0]}x{weight.shape[1]} NF4 weight needs "
                f"ceil({count} / {size}) = {math.ceil(count / size)}. Quantise the weight with blocks of {BLOCK}."
            )
    if count == 0 or not use_triton(weight.packed, backend):
        return _dequantize_torch(weight, dtype)
    from ft_dist_kernels.quantised import nf4_kernels as kernels

    return kernels.dequantize(weight, dtype, _code(weight.packed.device), nested_code(weight.packed.device))
