"""The parameters of a model by name and shape, from its config.json alone: without weights or torch.

Covers dense decoders of the families in `families.py`. For another family with the same config keys it assumes Llama's
layout, and the plan says so.
"""

from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from ft_dist.errors import ModelError
from ft_dist.model.builtin import SMOLLM2, cached_folder, resolve_model
from ft_dist.model.facts import MOST_LAYERS, read_json
from ft_dist.model.families import FAMILIES, Family, assumed_family, expert_count, ties_by_default
from ft_dist.model.tiny import tiny_config, tiny_names

# from the package's config.json (ft_dist/model/smollm.py), for machines that have not downloaded it
_SMOLLM2 = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
_MOST = (2**40, MOST_LAYERS)
"""Of any size, and of layers"""
BLOCK_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


@dataclass(frozen=True)
class Parameter:
    """A tensor of the model. `layer` is None outside the decoder's blocks."""

    name: str
    shape: tuple[int, ...]
    layer: int | None
    linear: bool

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a dense decoder. All in elements; `hidden` H, `intermediate` I, `vocabulary` V."""

    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    qkv_bias: bool = False
    output_bias: bool = False

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def known(self) -> bool:
        return self.family in FAMILIES

    @property
    def form(self) -> Family:
        """How the family's blocks are built; assumed if the family is not in the table."""
        return assumed_family(self.family)

    def linears(self) -> list[tuple[str, int, int]]:
        """(name, out, in) of the matrices of a block, in the order of the forward pass."""
        h, i, q, kv = self.hidden, self.intermediate, self.q_width, self.kv_width
        if self.form.joined:
            attention = [("self_attn.qkv_proj", q + 2 * kv, h)]
            gated = [("mlp.gate_up_proj", 2 * i, h)]
        else:
            attention = [(f"self_attn.{name}_proj", width, h) for name, width in (("q", q), ("k", kv), ("v", kv))]
            gated = [("mlp.gate_proj", i, h), ("mlp.up_proj", i, h)]
        return [*attention, ("self_attn.o_proj", h, q), *gated, ("mlp.down_proj", h, i)]

    @cached_property
    def parameters(self) -> list[Parameter]:
        """Every parameter once; a tied head adds none."""
        found = [Parameter("model.embed_tokens.weight", (self.vocabulary, self.hidden), None, False)]
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            for name, out, width in self.linears():
                found.append(Parameter(f"{prefix}{name}.weight", (out, width), layer, True))
                biased = self.output_bias if name.endswith("o_proj") else self.qkv_bias and "self_attn" in name
                if biased:
                    found.append(Parameter(f"{prefix}{name}.bias", (out,), layer, False))
            norms = [(f"{name}.weight", self.hidden) for name in BLOCK_NORMS[: self.form.block_norms]]
            if self.form.head_norms:
                norms += [("self_attn.q_norm.weight", self.head_dim), ("self_attn.k_norm.weight", self.head_dim)]
            found += [Parameter(prefix + name, (width,), layer, False) for name, width in norms]
        found.append(Parameter("model.norm.weight", (self.hidden,), None, False))
        if not self.tied:
            found.append(Parameter("lm_head.weight", (self.vocabulary, self.hidden), None, False))
        return found

    @cached_property
    def total_parameters(self) -> int:
        return sum(parameter.numel for parameter in self.parameters)

    @cached_property
    def block_matrices(self) -> int:
        """Elements of the matrices of one block."""
        return sum(out * width for _, out, width in self.linears())

    @property
    def head(self) -> Parameter:
        """The output head's matrix, tied or not."""
        return Parameter("lm_head.weight", (self.vocabulary, self.hidden), None, True)


def model_shape(path: str, *, revision: str | None = None) -> ModelShape:
    """The shape of a folder, built-in name or hub id; from the hub it reads only config.json. Creates nothing.

    Raises ModelError if the model does not exist, is not a dense decoder, or cannot be reached.
    """
    return shape_of_config(_read_config(path, revision), path)


def shape_of_config(whole: dict[str, Any], path: str) -> ModelShape:
    """From the tree of a config.json. Raises ModelError."""
    config = whole.get("text_config") or whole
    if not isinstance(config, dict):
        raise ModelError(f"model.path={path}: text_config in its config.json is not an object.")
    family = str(config.get("model_type", whole.get("model_type", "unknown")))[:80]
    if experts := expert_count(config):
        raise ModelError(f"model.path={path}: has {experts} experts per layer, but plan supports only dense decoders.")
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    missing = [name for name in names if type(config.get(name)) is not int]
    if missing:
        raise ModelError(
            f"model.path={path}: config.json ({family}) has no {', '.join(missing)}; plan supports dense decoders that "
            "specify these."
        )
    optional = ("num_key_value_heads", "head_dim")
    for name in (*names, *(name for name in optional if config.get(name) is not None)):
        if type(config[name]) is not int or not 1 <= config[name] <= _MOST[name == "num_hidden_layers"]:
            shown = ascii(config[name])[:40]
            raise ModelError(f"model.path={path}: {name}={shown} in its config.json, which no model can have.")
    heads = config["num_attention_heads"]
    biased = bool(config.get("attention_bias", False))
    qkv_bias = FAMILIES[family].qkv_bias if family in FAMILIES else None
    return ModelShape(
        family="gemma3_text" if family == "gemma3" else family,
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or max(1, config["hidden_size"] // heads),
        vocabulary=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", whole.get("tie_word_embeddings", ties_by_default(family)))),
        qkv_bias=biased if qkv_bias is None else qkv_bias,
        output_bias=biased and qkv_bias is None,
    )


def _read_config(path: str, revision: str | None) -> dict[str, Any]:
    if path in (SMOLLM2, *tiny_names()):
        folder = cached_folder(path)
        if folder is None:
            return dict(_SMOLLM2) if path == SMOLLM2 else tiny_config(path)
    else:
        place = resolve_model(path)
        folder = Path(place)
        if not folder.is_dir():
            return _from_hub(place, revision)
    return read_json(folder / "config.json")


def _from_hub(hub_id: str, revision: str | None) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download

    from ft_dist.model.builtin import check_hub

    check_hub(hub_id, revision)
    try:
        return read_json(Path(hf_hub_download(hub_id, "config.json", revision=revision)))
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise ModelError(
            f"model.path={hub_id}: its config.json could not be downloaded from the hub ({reason})."
        ) from None
