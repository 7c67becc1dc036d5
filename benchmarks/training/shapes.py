"""Models by name: the real SmolLM2, or random weights of a published shape (speed does not depend on the values)."""

from typing import Any

import torch

# hidden, intermediate, layers, heads, kv heads, vocabulary, tied embeddings; from the models' own config.json
LLAMA_SHAPES = {
    "llama3-8b": (4096, 14336, 32, 32, 8, 128256, False),
    "llama3.2-3b": (3072, 8192, 28, 24, 8, 128256, True),
    "smollm2-135m": (576, 1536, 30, 9, 3, 49152, True),
    "tiny": (64, 128, 2, 4, 2, 512, True),
}


def build(name: str, *, dtype: torch.dtype, device: str) -> Any:
    """A Llama model of that shape with random weights, in training mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = LLAMA_SHAPES[name]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=8192,
        use_cache=False,
    )
    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).train()
    finally:
        torch.set_default_dtype(previous)
