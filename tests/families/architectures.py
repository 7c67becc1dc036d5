"""Tiny random models of the architectures that transformers offers for causal language modelling.

A config starts from its class's defaults; sizes shrink by rule, and `OVERRIDES` has what the rules cannot know.
"""

import zlib
from pathlib import Path
from typing import Any

import torch

from ft_dist.model.quiet import quietly
from ft_dist.model.tiny import MAX_POSITIONS, VOCAB_SIZE, byte_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
    "head_dim": 16,
    # other spellings
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": MAX_POSITIONS,
    "n_ctx": MAX_POSITIONS,
    "n_inner": 96,
    "d_model": 64,
    "n_layers": 2,
    "n_heads": 4,
    "ffn_dim": 96,
    "ffn_hidden_size": 96,
    "num_layers": 2,
    "num_heads": 4,
    "word_embed_proj_dim": 64,
    "max_seq_len": 512,
    "embed_dim": 64,
    # experts
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "top_k_experts": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "expert_ffn_hidden_size": 32,
    "intermediate_size_mlp": 96,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_groups": 1,
    # latent attention
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 24,
    "v_head_dim": 16,
    "index_head_dim": 16,
    "index_n_heads": 16,  # few heads give scores of exactly 0, and then ties
    "index_topk": 16,
    # recurrent layers
    "mamba_d_state": 16,
    "mamba_d_head": 16,
    "mamba_n_heads": 8,
    "mamba_d_ssm": 128,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "mamba_n_groups": 1,
    "mamba_ngroups": 1,
    "mamba_chunk_size": 16,
    "mamba_dt_rank": 4,
    "chunk_size": 16,
    "state_size": 16,
    "ssm_state_size": 16,
    "lru_width": 64,
    "n_groups": 1,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "attention_window_size": 64,
    "sliding_window": 64,
    # gemma3n, gemma4
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "hidden_size_per_layer_input": 16,
    "global_head_dim": 16,
    "num_global_key_value_heads": 2,
    "query_pre_attn_scalar": 16,
    "laurel_rank": 8,
    "num_kv_shared_layers": 0,
}
"""Key of a config: its value in a tiny model, where the class has a number there"""

KINDS_OF_LAYERS = ("layer_types", "layers_block_type", "_pattern", "layers_type")
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
TOKENS = {"bos_token_id": 257, "eos_token_id": 259, "pad_token_id": 256, "eod_token_id": 257}


def tiny_config(model_type: str) -> Any:
    """A transformers config of `model_type` with tiny sizes."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type)
    config = config.get_text_config()
    defaults = config.to_dict()
    settings = {key: SIZES[key] for key, value in defaults.items() if key in SIZES and _is_size(key, value)}
    settings |= {key: 0.0 for key, value in defaults.items() if _is_dropout(key) and isinstance(value, float)}
    settings |= {key: value for key, value in TOKENS.items() if key in defaults}
    # at least one layer of every kind
    layers = 2
    for key, value in defaults.items():
        if isinstance(value, list) and len(value) > 1 and key.endswith(KINDS_OF_LAYERS):
            kinds = list(dict.fromkeys(value))
            layers = max(layers, len(kinds))
            settings[key] = (kinds * layers)[:layers]
    settings |= {key: layers for key in LAYER_COUNTS if key in settings}
    if "qk_rope_head_dim" in settings and "head_dim" in settings:
        settings["head_dim"] = settings["qk_rope_head_dim"]
    if "kv_lora_rank" in settings and "num_key_value_heads" in settings:
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    settings |= OVERRIDES.get(model_type, {})
    return type(config)(**settings)


def _is_size(key: str, value: Any) -> bool:
    """A key that is None by default stays None, unless its class then computes it from others."""
    computed = value is None and key in ("num_key_value_heads", "head_dim")
    return computed or (isinstance(value, int | float) and not isinstance(value, bool))


def _is_dropout(key: str) -> bool:
    """Randomness of training alone, without which its loss is that of evaluation."""
    return "dropout" in key or "jitter" in key or key.endswith(("pdrop", "_drop"))


OVERRIDES: dict[str, dict[str, Any]] = {
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 64},
    "mamba2": {"expand": 2, "num_heads": 8, "head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "dots1": {"num_key_value_heads": 4, "n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": {"n_routed_experts": 4, "num_experts_per_tok": 2},
    # scaled and capped logits, under every name and in both directions
    "falcon_h1": {"lm_head_multiplier": 0.125},
    "hyperclovax": {"logits_scaling": 0.25},
    "granite": {"logits_scaling": 8.0},
    "granitemoehybrid": {"logits_scaling": 6.0},
}


_NAMES = """
afmoe apertus arcee aria_text axk1 axk2 bamba bart beam bert biogpt bitnet bloom codegen cohere cohere2 cohere2_moe
cpmant ctrl cwm deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 diffllama doge dots1 electra ernie4_5 ernie4_5_moe
exaone4 exaone_moe falcon falcon_h1 falcon_mamba flex_olmo flint fuyu gemma gemma2 gemma3_text gemma3n_text
gemma4_text gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa gpt2 gpt_bigcode gpt_neo gpt_neox
gpt_neox_japanese gpt_oss gptj granite granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared
helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4 hyperclovax inkling2_text inkling_text internlm3
iquestcoder jais2 jamba jetmoe kimi_linear kolibri1 laguna lfm2 lfm2_moe lfm3 llama llama4_text longcat_flash mamba
mamba2 mellum mimo_v2_flash minicpm3 minimax minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral
modernbert-decoder moshi mpt nanochat nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe openai-gpt opt
persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next recurrent_gemma
rembert roberta rwkv seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma xglm xlnet xlstm youtu zamba2
"""
ARCHITECTURES = _NAMES.split()
"""Values of `model_type`"""


def make(model_type: str, folder: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """A folder with a random model and a tokenizer. Buffers stay in fp32."""
    import transformers

    with quietly():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=torch.float32)
        fill(model)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        model.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
    return folder


def fill(model: Any) -> None:
    """Move every parameter off its initial value, so that a layer that is ignored or used twice shows in the loss."""
    saved = set(model.state_dict())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        with torch.no_grad():
            if isinstance(tensor, torch.nn.Parameter) and tensor.dim() >= 2 and "embed" not in name:
                tensor.copy_(noise * tensor.shape[-1] ** -0.5)
            elif name in saved and tensor.is_floating_point() and "decay" not in name:  # decays hold a causal mask
                tensor.add_(0.1 * noise)
