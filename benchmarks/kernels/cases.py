"""Every op at the shapes of well-known models, with Hugging Face's and PEFT's form of it.

Shapes: T tokens, H hidden, I intermediate, V vocabulary, R rank, D head. Costs count a forward and a backward pass in
16-bit numbers, each input read once and each output written once.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from ft_dist_kernels.lora.op import LoraWeights, lora_linear_group
from ft_dist_kernels.quantised.nf4 import dequantize_nf4, dequantize_nf4_reference, quantize_nf4
from torch import Tensor

from benchmarks.kernels.extended import as_one
from benchmarks.kernels.fp8 import fp8_here, on_fp8
from benchmarks.kernels.harness import Case
from benchmarks.kernels.peers import peers_of


class Model(NamedTuple):
    name: str
    hidden: int
    intermediate: int
    vocabulary: int
    heads: int
    kv_heads: int
    head: int
    gelu: bool = False


SMOLLM2 = Model("SmolLM2-135M", 576, 1536, 49152, 9, 3, 64)
TINY = Model("tiny", 64, 160, 512, 4, 2, 16)
LLAMA3 = Model("Llama-3-8B", 4096, 14336, 128256, 32, 8, 128)
QWEN3 = Model("Qwen3-8B", 4096, 12288, 151936, 32, 8, 128)
GEMMA3 = Model("Gemma-3-4B", 2560, 10240, 262208, 8, 4, 256, gelu=True)
RANK, SCALE, DROPOUT = 16, 2.0, 0.05


def _normal(*shape: int, dtype: torch.dtype, device: str, std: float = 1.0, grad: bool = True) -> Tensor:
    generator = torch.Generator(device).manual_seed(sum(shape))
    tensor = torch.randn(shape, generator=generator, dtype=torch.float32, device=device) * std
    return tensor.to(dtype).requires_grad_(grad)


def _lora(label: str, tokens: int, inner: int, outers: tuple[int, ...], dropout: float) -> Case:
    count = len(outers)

    def make(tokens: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
        to = {"dtype": dtype, "device": device}
        inputs = {"x": _normal(tokens, inner, **to)}
        for i, outer in enumerate(outers):
            inputs[f"w{i}"] = _normal(outer, inner, std=inner**-0.5, grad=False, **to)
            inputs[f"a{i}"] = _normal(RANK, inner, std=inner**-0.5, **to)
            inputs[f"b{i}"] = _normal(outer, RANK, std=0.02, **to)
        return inputs

    def ours(x: Tensor, **w: Tensor) -> tuple[Tensor, ...]:
        members = [
            LoraWeights(w[f"w{i}"], None, w[f"a{i}"], w[f"b{i}"], SCALE, dropout, i if dropout else None)
            for i in range(count)
        ]
        return tuple(lora_linear_group(x, members))

    def eager(x: Tensor, **w: Tensor) -> tuple[Tensor, ...]:
        """The operations of peft.tuners.lora.Linear.forward, in its order."""
        outputs = []
        for i in range(count):
            base = F.linear(x, w[f"w{i}"])
            dropped = F.dropout(x, dropout) if dropout else x
            outputs.append(base + F.linear(F.linear(dropped, w[f"a{i}"]), w[f"b{i}"]) * SCALE)
        return tuple(outputs)

    def seeded(x: Tensor, **w: Tensor) -> tuple[Tensor, ...]:
        from ft_dist_kernels.lora.op import lora_linear_reference

        return tuple(
            lora_linear_reference(x, w[f"w{i}"], w[f"a{i}"], w[f"b{i}"], scale=SCALE, dropout_p=dropout, dropout_seed=i)
            for i in range(count)
        )

    def floor(x: Tensor, **w: Tensor) -> tuple[Tensor, ...]:
        """The frozen products alone; the adapters are touched so that they get (zero-cost) gradients."""
        touch = sum(w[f"{k}{i}"].sum() for i in range(count) for k in "ab") * 0.0
        return (*(F.linear(x, w[f"w{i}"]) for i in range(count - 1)), F.linear(x, w[f"w{count - 1}"]) + touch)

    def cost(tokens: int) -> tuple[float, float]:
        weights = sum(2 * 2 * inner * outer for outer in outers)
        moved = weights + sum(2 * 2 * tokens * outer for outer in outers) + 3 * 2 * tokens * inner
        return moved, sum(4 * tokens * inner * outer + 6 * tokens * RANK * (inner + outer) for outer in outers)

    return Case(
        op="lora_linear",
        label=f"{label} {inner}->{'+'.join(map(str, outers))} r={RANK} p={dropout} T={tokens}",
        tokens=tokens,
        make=make,
        ours=ours,
        eager=eager,
        cost=cost,
        formula="bytes 4IO + 4TO + 6TI; FLOPs 4TIO + 6TR(I+O)",
        floor=floor,
        truth=seeded,
        yardstick=seeded,
    )


def _fp8(label: str, tokens: int, inner: int, outers: tuple[int, ...]) -> list[Callable[[], Case]]:
    if not fp8_here(inner, outers):
        return []
    return [lambda: on_fp8(_lora(label, tokens, inner, outers, 0.0), members=len(outers), scale=SCALE)]


def _lora_extended(label: str, tokens: int, inner: int, outers: tuple[int, ...], dropout: float) -> Case:
    apart = _lora(label, tokens, inner, outers, dropout)
    return as_one(apart, members=len(outers), rank=RANK, scale=SCALE, dropout=dropout)


def _loss(model: Model, tokens: int, frozen: bool) -> Case:
    from ft_dist_kernels.cross_entropy.op import linear_cross_entropy

    def make(tokens: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
        to = {"dtype": dtype, "device": device}
        labels = torch.randint(model.vocabulary, (tokens,), generator=torch.Generator().manual_seed(3)).to(device)
        labels[::4] = -100
        return {
            "hidden": _normal(tokens, model.hidden, **to),
            "weight": _normal(model.vocabulary, model.hidden, std=model.hidden**-0.5, grad=not frozen, **to),
            "labels": labels,
        }

    def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """transformers' ForCausalLMLoss: whole logits, widened to fp32."""
        logits = F.linear(hidden, weight)
        logits = logits.float() if logits.dtype != torch.float64 else logits
        return F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")

    def cost(tokens: int) -> tuple[float, float]:
        labelled, products = tokens * 3 // 4, 2 if frozen else 3
        weight = 2 * model.vocabulary * model.hidden
        return products * weight + 4 * 2 * labelled * model.hidden, products * labelled * weight

    return Case(
        op="linear_cross_entropy",
        label=f"{model.name} H={model.hidden} V={model.vocabulary} {'frozen' if frozen else 'trained'} T={tokens}",
        tokens=tokens,
        make=make,
        ours=lambda hidden, weight, labels: linear_cross_entropy(hidden, weight, labels).loss,
        eager=eager,
        cost=cost,
        formula="N = 3T/4 labelled, k = 2 products (3 if trained): bytes 2kVH + 8NH; FLOPs 2kNVH",
        peers=peers_of("linear_cross_entropy", eager),
    )


def _norm(model: Model, tokens: int) -> Case:
    from ft_dist_kernels.rms_norm.op import rms_norm, rms_norm_reference

    def make(tokens: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
        to = {"dtype": dtype, "device": device}
        return {"x": _normal(tokens, model.hidden, **to), "weight": _normal(model.hidden, **to)}

    def eager(x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm_reference(x, weight, eps=1e-6)  # type: ignore[return-value]

    return Case(
        op="rms_norm",
        label=f"{model.name} H={model.hidden} T={tokens}",
        tokens=tokens,
        make=make,
        ours=lambda x, weight: rms_norm(x, weight, eps=1e-6),
        eager=eager,
        cost=lambda tokens: (2.0 * 5 * tokens * model.hidden, 0.0),
        formula="bytes 2 * 5TH (x, y; x, dy, dx)",
        peers=peers_of("rms_norm", eager),
    )


def _glu(model: Model, tokens: int) -> Case:
    from ft_dist_kernels.glu.op import geglu, swiglu

    def make(tokens: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
        to = {"dtype": dtype, "device": device}
        return {"gate": _normal(tokens, model.intermediate, **to), "up": _normal(tokens, model.intermediate, **to)}

    def eager(gate: Tensor, up: Tensor) -> Tensor:
        return (F.gelu(gate, approximate="tanh") if model.gelu else F.silu(gate)) * up

    op = "geglu" if model.gelu else "swiglu"
    return Case(
        op=op,
        label=f"{model.name} I={model.intermediate} T={tokens}",
        tokens=tokens,
        make=make,
        ours=geglu if model.gelu else swiglu,
        eager=eager,
        cost=lambda tokens: (2.0 * 8 * tokens * model.intermediate, 0.0),
        formula="bytes 2 * 8TI (gate, up, y; gate, up, dy, dgate, dup)",
        peers=peers_of(op, eager),
    )


def _rope(model: Model, tokens: int) -> Case:
    from ft_dist_kernels.rope.op import rope, rope_tables

    def make(tokens: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
        to = {"dtype": dtype, "device": device}
        frequencies = 1.0 / 10000 ** (torch.arange(0, model.head, 2, device=device) / model.head)
        cos, sin = rope_tables(torch.arange(tokens, device=device)[None], frequencies, dtype=dtype)
        # As attention makes them: heads are a transposed view of the projection's output.
        q = _normal(1, tokens, model.heads, model.head, grad=False, **to).transpose(1, 2).requires_grad_()
        k = _normal(1, tokens, model.kv_heads, model.head, grad=False, **to).transpose(1, 2).requires_grad_()
        return {"q": q, "k": k, "cos": cos, "sin": sin}

    def eager(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """transformers' apply_rotary_pos_emb."""

        def half(x: Tensor) -> Tensor:
            return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)

        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return q * cos + half(q) * sin, k * cos + half(k) * sin

    heads = model.heads + model.kv_heads
    return Case(
        op="rope",
        label=f"{model.name} {model.heads}q+{model.kv_heads}kv D={model.head} T={tokens}",
        tokens=tokens,
        make=make,
        ours=rope,
        eager=eager,
        cost=lambda tokens: (2.0 * 4 * tokens * heads * model.head, 0.0),
        formula="bytes 2 * 4T(heads)D (x, y; dy, dx)",
        peers=peers_of("rope", eager),
    )


def _segments(model: Model, tokens: int, longest: int, *, window: int | None = None, shared: int = 0) -> Case:
    """One packed row of samples between a quarter of `longest` and `longest`. With `shared`, up to half the row, all
    samples share a prefix of that many tokens, which comes first in the row."""
    from ft_dist_kernels.attention.op import segment_attention
    from ft_dist_kernels.attention.ragged_segments import lay_ragged
    from ft_dist_kernels.attention.segments import lay_segments

    scale, repeats = model.head**-0.5, model.heads // model.kv_heads

    def make(tokens: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
        to = {"dtype": dtype, "device": device}
        beginning = min(shared, tokens // 2)
        lengths = torch.randint(longest // 4, longest + 1, (tokens,), generator=torch.Generator().manual_seed(1))
        sample = torch.arange(1, tokens + 1).repeat_interleave(lengths)[: tokens - beginning]
        own = torch.unique_consecutive(sample, return_counts=True)[1].tolist()
        ends = torch.tensor([beginning, *own]).cumsum(0).tolist()
        front = torch.arange(beginning)
        parts = [torch.cat([front, torch.arange(*pair)]) for pair in pairwise(ends)]
        lay = lay_segments if device == "cpu" else lay_ragged
        segments = lay(torch.cat(parts), torch.tensor([len(part) for part in parts]))
        sample = torch.cat([torch.zeros_like(front), sample])
        position = torch.cat([front, *(beginning + torch.arange(length) for length in own)])
        distance = position[:, None] - position
        mask = ((sample[:, None] == sample) | (sample == 0)) & (distance >= 0)
        if window is not None:
            mask &= distance < window
        inputs = {
            name: _normal(1, tokens, heads, model.head, grad=False, **to).transpose(1, 2).requires_grad_()
            for name, heads in (("q", model.heads), ("k", model.kv_heads), ("v", model.kv_heads))
        }
        return inputs | {"segments": segments.to(device), "mask": mask[None, None].to(device)}

    def ours(q: Tensor, k: Tensor, v: Tensor, segments: Any, mask: Tensor) -> Tensor:
        return segment_attention(q, k, v, segments, scale=scale, window=window)

    def eager(q: Tensor, k: Tensor, v: Tensor, segments: Any, mask: Tensor) -> Tensor:
        """transformers' sdpa_attention_forward with the mask that it makes for packed rows."""
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)

    heads, seen = 2 * model.heads + 2 * model.kv_heads, min(longest + shared, window or longest + shared)
    kind = "".join((f", window {window}" if window else "", f", {shared} shared" if shared else ""))
    return Case(
        op="segment_attention",
        label=f"{model.name} T={tokens}, samples of {longest // 4}-{longest}{kind}",
        tokens=tokens,
        make=make,
        ours=ours,
        eager=eager,
        cost=lambda tokens: (2.0 * 2 * tokens * heads * model.head, 7.0 * tokens * seen * model.heads * model.head),
        formula="bytes 2 * 2T(q, k, v, y); FLOPs 7 T keys (heads D), keys the most that a token may see, half masked",
    )


def _nf4(model: Model) -> Case:
    rows, columns = model.intermediate, model.hidden

    def make(tokens: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
        weight = _normal(tokens, columns, std=0.02, grad=False, dtype=torch.float32, device=device)
        return {"weight": quantize_nf4(weight), "dtype": dtype}

    return Case(
        op="nf4",
        label=f"{model.name} {rows}x{columns}, forward alone",
        tokens=rows,
        make=make,
        ours=dequantize_nf4,
        eager=dequantize_nf4_reference,
        cost=lambda rows: (rows * columns * (0.5 + 1 / 64 + 2.0), 0.0),
        formula="bytes N (1/2 + 1/64 + 2)",
        truth=lambda weight, dtype: dequantize_nf4_reference(weight, torch.float32),
    )


def cases_of(model: Model, tokens: int) -> dict[str, list[Callable[[], Case]]]:
    kv, q = model.kv_heads * model.head, model.heads * model.head
    return {
        "lora_linear": [
            lambda: _lora(f"{model.name} o", tokens, q, (model.hidden,), 0.0),
            lambda: _lora(f"{model.name} qkv", tokens, model.hidden, (q, kv, kv), 0.0),
            lambda: _lora(f"{model.name} qkv", tokens, model.hidden, (q, kv, kv), DROPOUT),
            lambda: _lora(f"{model.name} gate,up", tokens, model.hidden, (model.intermediate,) * 2, 0.0),
            lambda: _lora(f"{model.name} down", tokens, model.intermediate, (model.hidden,), DROPOUT),
        ],
        "fp8_linear": [
            *_fp8(f"{model.name} qkv", tokens, model.hidden, (q, kv, kv)),
            *_fp8(f"{model.name} gate,up", tokens, model.hidden, (model.intermediate,) * 2),
            *_fp8(f"{model.name} down", tokens, model.intermediate, (model.hidden,)),
        ],
        "lora_extended": [
            lambda: _lora_extended(f"{model.name} qkv", tokens, model.hidden, (q, kv, kv), 0.0),
            lambda: _lora_extended(f"{model.name} gate,up", tokens, model.hidden, (model.intermediate,) * 2, DROPOUT),
            lambda: _lora_extended(f"{model.name} down", tokens, model.intermediate, (model.hidden,), 0.0),
        ],
        "linear_cross_entropy": [lambda: _loss(model, tokens, True), lambda: _loss(model, tokens, False)],
        "rms_norm": [lambda: _norm(model, tokens)],
        "geglu" if model.gelu else "swiglu": [lambda: _glu(model, tokens)],
        "rope": [lambda: _rope(model, tokens)],
        "segment_attention": [
            lambda: _segments(model, tokens, 64),
            lambda: _segments(model, tokens, 512),
            lambda: _segments(model, tokens, 512, window=100),
            lambda: _segments(model, tokens, 128, shared=300),
            lambda: _segments(model, tokens, 128, shared=300, window=100),
        ],
        "nf4": [lambda: _nf4(model)],
    }


OPS = (
    "lora_linear",
    "fp8_linear",
    "lora_extended",
    "linear_cross_entropy",
    "rms_norm",
    "swiglu",
    "geglu",
    "rope",
    "segment_attention",
    "nf4",
)


def cases(device: str, ops: tuple[str, ...], *, quick: bool, tiny: bool = False) -> list[Case]:
    """SmolLM2-135M's shapes on CPU (with a GELU twin for geglu), the three large models' on a GPU."""
    if tiny:
        models = [cases_of(TINY, 64)]
    elif device == "cpu":
        tokens = 512 if quick else 2048
        models = [cases_of(SMOLLM2, tokens), {"geglu": cases_of(SMOLLM2._replace(gelu=True), tokens)["geglu"]}]
    else:
        models = [cases_of(model, 8192) for model in ((LLAMA3,) if quick else (LLAMA3, QWEN3, GEMMA3))]
        if quick:
            models.append({"geglu": cases_of(GEMMA3, 8192)["geglu"]})
    return [make() for op in ops for model in models for make in model.get(op, ())]
