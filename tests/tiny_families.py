"""Tiny random models of architectures that hold more than weights: router biases and layer scales as buffers, experts
as one tensor; and multimodal ones. Sizes as in `ft_dist.model.tiny`, whose tokenizer they use."""

import shutil
from pathlib import Path
from typing import Any

import torch

from ft_dist.model.builtin import resolve_model
from ft_dist.model.quiet import quietly
from ft_dist.model.tiny import VOCAB_SIZE

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "pad_token_id": 256,
    "bos_token_id": 257,
    "eos_token_id": 259,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": 14,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        {
            **EXPERTS,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
            "q_lora_rank": None,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
        },
    ),
    "glm4_moe": (
        "Glm4MoeForCausalLM",
        {**EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    ),
    "minimax_m2": ("MiniMaxM2ForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "lfm2_moe": (
        "Lfm2MoeForCausalLM",
        {**EXPERTS, "num_experts": 4, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    ),
    "gemma4_text": (
        "Gemma4ForCausalLM",
        {
            "layer_types": ["sliding_attention", "full_attention"],
            "global_head_dim": 16,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB_SIZE,
            "num_kv_shared_layers": 0,
        },
    ),
    "nemotron_h": (
        "NemotronHForCausalLM",
        {
            **EXPERTS,
            "layers_block_type": ["attention", "moe"],
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "moe_shared_expert_intermediate_size": 32,
            "moe_latent_size": None,
        },
    ),
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


def make_family(name: str, folder: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """A folder with a random model of the architecture; no buffer has its initial value."""
    import transformers

    class_name, extra = FAMILIES[name]
    model_class = getattr(transformers, class_name)
    torch.manual_seed(0)
    with quietly():
        config = model_class.config_class(**({} if "text_config" in extra else SIZES) | extra)
        model = model_class(config).to(dtype)
        saved = model.state_dict().keys()
        for buffer_name, buffer in model.named_buffers():
            if buffer_name in saved and buffer.is_floating_point():
                scale = 0.1 if buffer.numel() > 1 else 0.3
                buffer.data = buffer.float() + scale * torch.randn(buffer.shape)
        model.save_pretrained(folder)
    for path in Path(resolve_model("tiny-llama")).glob("*token*"):
        shutil.copy(path, folder)
    for path in Path(resolve_model("tiny-llama")).glob("*.jinja"):
        shutil.copy(path, folder)
    return folder
