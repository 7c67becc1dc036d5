"""Merges an adapter into its base, and proves that the folder written from it is base + adapter.

The update is added in fp32 to the weights that training saw, and each sum is rounded once, to the dtype of its tensor.
E: experts, R: rank, O: rows of a matrix, I: its columns.
"""

from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ft_dist.data.stream.batch import IGNORED
from ft_dist.engine.digests import persistent_buffers
from ft_dist.errors import ModelError, UserError
from ft_dist.method.lora import OF_ADAPTERS
from ft_dist.model.anatomy.weights import reason_of
from ft_dist.model.load import DTYPES
from ft_dist.model.parts.trained import unwrapped
from ft_dist.model.quiet import quietly
from ft_dist.result.load import Weights, load_weights
from ft_dist.result.proof import SAMPLES, ProofRow, agree, fits, loss_of, token_budget
from ft_dist.result.untie import untie_where_adapted

CANDIDATES = 64
"""The shortest of the first samples are scored"""
RANDOM_ROWS, RANDOM_TOKENS = 4, 64
FP32_SUM = 4e-6
"""Error of a sum and product in fp32, relative to the largest summand"""


def merge(weights: Weights, *, vocabulary: int, dtype: torch.dtype | None = None) -> Any:
    """The base with the adapter merged (LoRA, rsLoRA, DoRA, trained token rows).

    Each tensor gets the dtype in which training held it (a router's fp32 bias stays in fp32), or `dtype`.
    """
    adapted = load_weights(weights, dtype=trained_dtype(weights), vocabulary=vocabulary)
    untie_where_adapted(adapted)
    stored = {unwrapped(name): tensor.dtype for name, tensor in _tensors(adapted.get_base_model())}
    model = adapted.float().merge_and_unload(safe_merge=True)
    model.config.use_cache = True  # training runs without a cache, but generation needs one
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype or stored.get(name, trained_dtype(weights)))
    return model


def trained_dtype(weights: Weights) -> torch.dtype:
    """The run's dtype; for an adapter without a run, that of its base."""
    from transformers import AutoConfig

    if weights.config is not None:
        return DTYPES[weights.config.model.dtype]
    try:
        own = AutoConfig.from_pretrained(weights.base, trust_remote_code=weights.trust_remote_code).dtype
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{weights.base}: its config.json cannot be loaded ({reason_of(error)}).") from None
    return own if isinstance(own, torch.dtype) else torch.float32


def prove_merged(weights: Weights, folder: Path, *, tokenizer: Any) -> str:
    """Load the merged model in `folder` and compare every tensor with base + update; returns a line with the numbers.

    It also scores both models on a few samples. Raises ModelError naming a tensor that differs, or if the losses do
    although nothing was rounded.
    """
    from transformers import AutoModelForCausalLM

    nbytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    reason = fits(2 * nbytes)
    if reason:
        return f"not checked: {reason}"
    adapted = load_weights(weights, dtype=trained_dtype(weights), vocabulary=len(tokenizer)).eval()
    untie_where_adapted(adapted)
    with quietly():
        merged = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=weights.trust_remote_code).eval()
    updated, same = compare_merged(adapted, merged, folder)
    rows = _rows(weights, tokenizer, token_budget(sum(p.numel() for p in merged.parameters())))
    loss, merged_loss = loss_of(adapted, rows), loss_of(merged, rows)
    rounded = next(merged.parameters()).dtype != torch.float32
    close = agree(loss, merged_loss, dtype="fp32")
    if not close and next(adapted.parameters()).dtype == torch.float32 and not rounded:
        raise ModelError(
            f"{folder.name}: the merged model scores {merged_loss:.4f}, base + adapter {loss:.4f}, on the same samples."
        )
    name = str(merged.dtype).removeprefix("torch.")
    line = (
        f"checked: {updated} tensors are base + update{f', rounded once to {name}' if rounded else ''}, {same} are the "
        f"base's; loss {merged_loss:.4f} merged, {loss:.4f} base + adapter, on {len(rows)} samples"
    )
    if rounded and not agree(loss, merged_loss, dtype="bf16"):
        line += f". Rounding to {name} loses part of the update: --dtype fp32 or --to adapter keeps it"
    return line


def compare_merged(adapted: Any, merged: nn.Module, folder: Path) -> tuple[int, int]:
    """(tensors with an update, tensors without) of `merged`, each equal to what `adapted` holds.

    Raises ModelError naming the first that differs by more than one rounding of base + update, computed here in fp64,
    or that is missing.
    """
    base = {unwrapped(name): tensor for name, tensor in _tensors(adapted.get_base_model())}
    found = {name: tensor.detach() for name, tensor in _tensors(merged)}
    odd = sorted(base.keys() ^ found.keys())
    if odd:
        raise ModelError(f"{folder.name}: {'lacks' if odd[0] in base else 'has'} the tensor {odd[0]}, unlike the base.")
    updates = dict(_updated(adapted.get_base_model()))
    held = {id(tensor) for tensor in base.values()}
    absent = [name for name in sorted(updates.keys() - base.keys()) if id(_weight(updates[name])) not in held]
    if absent:
        raise ModelError(f"{folder.name}: the adapter updates {absent[0]}, which the base does not have.")
    for name, tensor in found.items():
        if name not in updates:
            if not torch.equal(tensor, base[name].to(tensor.dtype)):
                raise ModelError(f"{folder.name}: {name} has no update, but differs from the base's.")
            continue
        for part in range(len(tensor) if tensor.ndim == 3 else 1):  # expert by expert
            if not _is_sum(*_parts(tensor, base[name], part), updates[name], part):
                expert = f" of expert {part}" if tensor.ndim == 3 else ""
                raise ModelError(f"{folder.name}: {name}{expert} is not base + update, rounded once.")
    updated = len(updates.keys() & found.keys())
    return updated, len(found) - updated


def _is_sum(merged: Tensor, base: Tensor, layer: Any, part: int) -> bool:
    expected = _expected(base.detach().double(), layer, part)
    rounding = 0.5 * torch.finfo(merged.dtype).eps * expected.abs()
    largest = torch.maximum(base.abs().max().double(), expected.abs().max())
    # comparing with <= is false for NaN
    return bool(((merged.double() - expected).abs() <= rounding + FP32_SUM * largest).all())


def _parts(merged: Tensor, base: Tensor, part: int) -> tuple[Tensor, Tensor]:
    return (merged[part], base[part]) if merged.ndim == 3 else (merged, base)


def _expected(base: Tensor, layer: Any, part: int) -> Tensor:
    """Base + update of a peft layer, or of the expert `part` of one, from the definition, in fp64; a tensor that was
    trained whole stands for itself."""
    if isinstance(layer, Tensor):
        return (layer[part] if layer.ndim == 3 else layer).detach().double()
    if hasattr(layer, "trainable_tokens_delta"):
        name = layer.active_adapters[0]
        base[torch.tensor(layer.token_indices[name])] = layer.trainable_tokens_delta[name].detach().double()
        return base
    name = layer.active_adapters[0]
    rank, alpha = layer.r[name], layer.lora_alpha[name]
    scale = alpha / (rank**0.5 if layer.use_rslora[name] else rank)
    embedding = name in layer.lora_embedding_A
    down = (layer.lora_embedding_A[name] if embedding else layer.lora_A[name].weight).detach().double()
    up = (layer.lora_embedding_B[name] if embedding else layer.lora_B[name].weight).detach().double()
    experts = getattr(layer, "num_experts", 1)
    if experts > 1:
        down = down.view(experts, rank, -1)[part]
        up = up.view(-1, rank, experts)[:, :, part]
    update = scale * up @ down  # (O, I)
    turned = embedding or getattr(layer, "fan_in_fan_out", False)
    if experts > 1:
        turned = getattr(layer.get_base_layer(), "is_transposed", False)
    whole = base + (update.T if turned else update)
    if name in layer.lora_magnitude_vector:
        whole *= (layer.lora_magnitude_vector[name].weight.detach().double() / whole.norm(dim=1))[:, None]
    return whole


def _weight(layer: Any) -> Tensor | None:
    """The weight that a peft layer updates: an output head's is the embedding's if the two are tied."""
    if isinstance(layer, Tensor):
        return None
    found: Tensor | None = getattr(layer.get_base_layer(), getattr(layer, "parameter_name", "weight"), None)
    return found


def _updated(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The peft layers, and the tensors that were trained whole, by the name of the tensor that they update."""
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "get_base_layer"):
            yield unwrapped(f"{name}.{getattr(module, 'parameter_name', 'weight')}"), module
        elif hasattr(module, "trainable_tokens_delta"):
            yield unwrapped(f"{name}.weight"), module
        elif hasattr(module, "modules_to_save"):
            for part, parameter in module.modules_to_save[module.active_adapters[0]].named_parameters():
                yield unwrapped(f"{name}.{part}"), parameter


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers, without those of adapters."""
    own = chain(model.named_parameters(), persistent_buffers(model))
    return ((name, tensor) for name, tensor in own if not any(part in name for part in OF_ADAPTERS))


def _rows(weights: Weights, tokenizer: Any, budget: int) -> list[ProofRow]:
    """A few short samples of the run's data if it is on this machine, else random tokens."""
    from ft_dist.data.encode.template import Encoder
    from ft_dist.data.read.formats import read_samples

    data = weights.config.data if weights.config else None
    sources = [source for source in (data.eval or data.train) if Path(source.path).exists()] if data else []
    rows: list[ProofRow] = []
    try:
        samples = islice(chain.from_iterable(read_samples(source) for source in sources), CANDIDATES)
        encoded = Encoder(tokenizer).encode_batch([sample for sample in samples if sample.tokens is None])
    except UserError:
        encoded = []
    for sample in sorted(encoded, key=lambda sample: len(sample.tokens)):
        budget -= len(sample.tokens)
        if budget < 0 or len(rows) == SAMPLES:
            break
        ids, mask = torch.from_numpy(sample.tokens.astype("int64")), torch.from_numpy(sample.mask)
        labels = torch.full_like(ids, IGNORED)
        labels[:-1] = torch.where(mask[1:], ids[1:], IGNORED)
        if bool((labels != IGNORED).any()):
            rows.append(ProofRow(ids, labels))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(len(tokenizer), (RANDOM_ROWS, RANDOM_TOKENS + 1), generator=generator)
    return rows or [ProofRow(row[:-1], row[1:]) for row in noise]
