"""Tiny random models with a text model and a vision tower."""

from pathlib import Path
from typing import Any

import torch

from ft_dist.model.quiet import quietly
from ft_dist.model.tiny import byte_tokenizer
from tests.families.architectures import SIZES as ALL_SIZES
from tests.families.architectures import TOKENS

TEXT_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
SIZES: dict[str, Any] = {key: ALL_SIZES[key] for key in TEXT_KEYS} | {k: TOKENS[k] for k in list(TOKENS)[:3]}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": 14,
}
MULTIMODAL: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_5": (
        "Qwen3_5ForConditionalGeneration",
        {
            "text_config": {
                **SIZES,
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 2,
                "linear_key_head_dim": 16,
                "linear_value_head_dim": 16,
                "layer_types": ["linear_attention", "full_attention"],
            },
            "vision_config": {
                "depth": 1,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 2,
                "out_hidden_size": 64,
            },
        },
    ),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {**SIZES, "query_pre_attn_scalar": 16, "sliding_window": 64},
            "vision_config": {
                **VISION,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "patch_size": 14,
                "image_size": 28,
            },
            "mm_tokens_per_image": 4,
            "image_token_index": 5,
        },
    ),
}


def make_multimodal(name: str, folder: Path) -> Path:
    """A folder with a random model and a tokenizer, in fp32."""
    import transformers

    class_name, settings = MULTIMODAL[name]
    model_class = getattr(transformers, class_name)
    torch.manual_seed(0)
    with quietly():
        model_class(model_class.config_class(**settings)).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
    return folder
