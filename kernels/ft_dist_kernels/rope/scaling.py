"""Inverse frequencies of rotary embeddings, as transformers' ROPE_INIT_FUNCTIONS compute them, from plain numbers.

    default   f_i = theta^(-2i / D)
    linear    f_i / factor                                           (kaiokendev)
    dynamic   theta grown with the sequence length (NTK-aware)       (bloc97, emozilla)
    yarn      interpolated below a ramp, untouched above it          (arXiv 2309.00071)
    llama3    interpolated for long wavelengths, smooth in between   (arXiv 2407.21783)
    longrope  each f_i divided by its own searched factor            (arXiv 2402.13753)

D is the rotated part of a head: head_dim * partial_rotary_factor.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

RopeType = Literal["default", "linear", "dynamic", "yarn", "llama3", "longrope"]
# The parameters that each type requires.
NEEDED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "max_position_embeddings"),
    "yarn": ("original_max_position_embeddings",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}


def rope_inv_freq(
    rope_type: RopeType = "default",
    *,
    head_dim: int,
    rope_theta: float,
    partial_rotary_factor: float = 1.0,
    factor: float | None = None,
    max_position_embeddings: int | None = None,
    original_max_position_embeddings: int | None = None,
    seq_len: int | None = None,
    attention_factor: float | None = None,
    beta_fast: float | None = None,
    beta_slow: float | None = None,
    mscale: float | None = None,
    mscale_all_dim: float | None = None,
    truncate: bool = True,
    low_freq_factor: float | None = None,
    high_freq_factor: float | None = None,
    short_factor: Sequence[float] | None = None,
    long_factor: Sequence[float] | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, float]:
    """(inv_freq (D / 2,) fp32, attention scaling for cos and sin). Names as in a config's `rope_parameters`.

    seq_len matters for `dynamic` and `longrope` only: the sequence length, or the model's maximum if None.
    Raises ValueError for an unknown type, or if a number that the type requires is missing.
    """
    if rope_type not in NEEDED:
        raise ValueError(f"rope_type={rope_type!r} is not one of {', '.join(NEEDED)}.")
    given = {
        "factor": factor,
        "max_position_embeddings": max_position_embeddings,
        "original_max_position_embeddings": original_max_position_embeddings,
        "low_freq_factor": low_freq_factor,
        "high_freq_factor": high_freq_factor,
        "short_factor": short_factor,
        "long_factor": long_factor,
    }
    for name in NEEDED[rope_type]:
        if given[name] is None:
            raise ValueError(f"rope_type={rope_type!r} needs {name}. Take it from the model's rope_parameters.")
    dim = int(head_dim * partial_rotary_factor)
    if dim < 2 or dim % 2:
        raise ValueError(
            f"head_dim={head_dim} * partial_rotary_factor={partial_rotary_factor} gives {dim} rotated columns; the "
            "half-split layout needs an even number >= 2."
        )
    if factor is None:
        longest, original = max_position_embeddings, original_max_position_embeddings
        factor = longest / original if longest and original else 1.0

    if rope_type == "dynamic":
        assert max_position_embeddings is not None
        length = max(seq_len or 0, max_position_embeddings)
        rope_theta *= (factor * length / max_position_embeddings - (factor - 1)) ** (dim / (dim - 2))
    steps = torch.arange(0, dim, 2, dtype=torch.int64).to(device=device, dtype=torch.float32) / dim
    if rope_type == "longrope":
        assert original_max_position_embeddings is not None
        chosen = long_factor if seq_len and seq_len > original_max_position_embeddings else short_factor
        divisors = torch.tensor(chosen, dtype=torch.float32, device=device)
        if attention_factor is None:
            growth = math.log(factor) / math.log(original_max_position_embeddings) if factor > 1 else 0.0
            attention_factor = math.sqrt(1 + growth)
        return 1.0 / (divisors * rope_theta**steps), attention_factor
    inv_freq = 1.0 / (rope_theta**steps)
    if rope_type == "linear":
        return inv_freq / factor, 1.0
    if rope_type == "llama3":
        assert low_freq_factor is not None
        assert high_freq_factor is not None
        assert original_max_position_embeddings is not None
        return _llama3(inv_freq, factor, low_freq_factor, high_freq_factor, original_max_position_embeddings), 1.0
    if rope_type == "yarn":
        assert original_max_position_embeddings is not None
        bounds = [
            dim * math.log(original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(rope_theta))
            for turns in (beta_fast or 32, beta_slow or 1)
        ]
        if truncate:
            bounds = [math.floor(bounds[0]), math.ceil(bounds[1])]
        inv_freq = _yarn(inv_freq, rope_theta**steps, factor, max(bounds[0], 0), min(bounds[1], dim - 1))
        return inv_freq, _yarn_attention(factor, attention_factor, mscale, mscale_all_dim)
    return inv_freq, 1.0


def _llama3(inv_freq: Tensor, factor: float, low: float, high: float, original: int) -> Tensor:
    wavelength = 2 * math.pi / inv_freq
    scaled = torch.where(wavelength > original / low, inv_freq / factor, inv_freq)
    smooth = (original / wavelength - low) / (high - low)
    between = ~(wavelength < original / high) & ~(wavelength > original / low)
    return torch.where(between, (1 - smooth) * scaled / factor + smooth * scaled, scaled)


def _yarn(inv_freq: Tensor, frequencies: Tensor, factor: float, low: float, high: float) -> Tensor:
    index = torch.arange(inv_freq.numel(), dtype=torch.float32, device=inv_freq.device)
    ramp = ((index - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (factor * frequencies) * (1 - kept) + inv_freq * kept


def _yarn_attention(
    factor: float,
    attention_factor: float | None,
    mscale: float | None,
    mscale_all_dim: float | None,
) -> float:
    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if attention_factor is not None:
        return attention_factor
    if mscale and mscale_all_dim:
        return scale(mscale) / scale(mscale_all_dim)
    return scale(1.0)
