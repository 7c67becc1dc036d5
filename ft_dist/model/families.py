"""What differs between families of decoder models: the one table that fused layers and planning read.

A model whose `model_type` is not in the table trains with transformers' own layers, and the run reports it. Torch-free.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """One architecture. The defaults describe Llama."""

    classes: str
    """Prefix of transformers' class names: LlamaRMSNorm, LlamaMLP, LlamaAttention"""
    sandwich_norms: bool = False
    """Attention's and the MLP's outputs are normalised before the residual addition"""
    head_norms: bool = False
    """Queries and keys are normalised per head"""
    joined: bool = False
    """q, k and v come from one matrix, and so do gate and up"""
    sliding_window: bool = False
    """Attention reads a window from the layer or the config"""
    softcapped_scores: bool = False
    """Attention scores are soft-capped before the softmax"""
    activation_key: str = "hidden_act"
    """Config key that names the activation of the gated MLP"""
    qkv_bias: bool | None = None
    """q, k and v have a bias and the output projection has none; None: `attention_bias` decides for all four"""

    @property
    def block_norms(self) -> int:
        """Norms of the residual stream in a block."""
        return 4 if self.sandwich_norms else 2


_GEMMA3 = Family(
    "Gemma3",
    sandwich_norms=True,
    head_norms=True,
    sliding_window=True,
    activation_key="hidden_activation",
)

FAMILIES: dict[str, Family] = {
    "llama": Family("Llama"),  # SmolLM and SmolLM2 too
    "mistral": Family("Mistral", sliding_window=True),
    "qwen2": Family("Qwen2", sliding_window=True, qkv_bias=True),
    "qwen3": Family("Qwen3", sliding_window=True, head_norms=True),
    "gemma2": Family(
        "Gemma2",
        sandwich_norms=True,
        sliding_window=True,
        softcapped_scores=True,
        activation_key="hidden_activation",
    ),
    "gemma3": _GEMMA3,  # the multimodal wrapper around gemma3_text
    "gemma3_text": _GEMMA3,
    "phi3": Family("Phi3", joined=True, sliding_window=True),
}
"""By `model_type`"""

_OTHER_GEMMA = Family("Gemma", sandwich_norms=True)


def assumed_family(model_type: str) -> Family:
    """The table's entry, or a guess for planning: other Gemmas have four norms per block, the rest Llama's form."""
    guess = _OTHER_GEMMA if model_type.startswith("gemma") else FAMILIES["llama"]
    return FAMILIES.get(model_type, guess)


EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts")
"""Config keys that give the number of experts in a layer"""


def expert_count(config: dict[str, Any]) -> int:
    """Experts in a layer of a config.json, 0 for a dense model."""
    counts = (config.get(key) for key in EXPERT_KEYS)
    return next((count for count in counts if type(count) is int and count > 0), 0)


def ties_by_default(model_type: str) -> bool:
    """Whether a config.json without `tie_word_embeddings` means a tied head: every Gemma's does."""
    return model_type.startswith("gemma")
