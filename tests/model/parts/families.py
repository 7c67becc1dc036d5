"""Tiny random models of families that are not built in: experts of every layout, recurrent layers, shared keys."""

from typing import Any

import torch

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEAD = {"head_dim": 16}
CHOICE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
ROUTED = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, **CHOICE}
DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
MAMBA = {"mamba_num_heads": 4, "mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 1}
GEMMA4 = {"global_head_dim": 32, "vocab_size_per_layer_input": 320, "hidden_size_per_layer_input": 16, **HEAD}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    "qwen3_moe": ("Qwen3MoeConfig", {"num_experts": 4, **CHOICE, **HEAD}),
    "olmoe": ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, **HEAD}),
    "gemma4": (
        "Gemma4TextConfig",
        {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            **GEMMA4,
        },
    ),
    "gemma4_moe": (
        "Gemma4TextConfig",
        {
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
            "num_kv_shared_layers": 0,
            **GEMMA4,
        },
    ),
    "qwen3_5_moe": (
        "Qwen3_5MoeTextConfig",
        {"num_experts": 4, "shared_expert_intermediate_size": 32, **CHOICE, **DELTA, **HEAD},
    ),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 32,
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 4,
            "mamba_d_head": 32,
            "mamba_n_groups": 1,
            "mamba_d_state": 16,
        },
    ),
    "jamba": (
        "JambaConfig",
        {
            "num_experts": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "use_mamba_kernels": False,
        },
    ),
    "lfm2_moe": (
        "Lfm2MoeConfig",
        {"num_experts": 4, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"], **CHOICE},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {"first_k_dense_replace": 1, "num_key_value_heads": 4, **ROUTED, **LATENT},
    ),
    "glm4_moe": ("Glm4MoeConfig", {"first_k_dense_replace": 1, **ROUTED, **HEAD}),
    "llama4": ("Llama4TextConfig", {"num_local_experts": 4, "intermediate_size_mlp": 96, **HEAD}),
    "nemotron_h": (
        "NemotronHConfig",
        {
            "layers_block_type": ["mamba", "attention", "moe"],
            "num_hidden_layers": 3,
            "moe_shared_expert_intermediate_size": 32,
            **ROUTED,
            **MAMBA,
            **HEAD,
        },
    ),
    "deepseek_v4": ("DeepseekV4Config", {"n_routed_experts": 4, "num_experts_per_tok": 2}),
}


def make(name: str, **more: Any) -> Any:
    """A model of family `name` in fp32, the same weights every time."""
    import transformers

    kind, sizes = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**SIZES | sizes | more)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
