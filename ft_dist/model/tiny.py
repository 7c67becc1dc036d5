"""Tiny random models, one per supported architecture: created on demand, with the same bits on every machine.

Two layers, hidden size 64, four heads of 16 over two key-value heads, and a tokenizer of the 256 bytes plus the ChatML
tokens. They serve the tests and the smoke recipe: real layers, untrained.
"""

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ft_dist.model.quiet import quietly

PAD, END_OF_TEXT, TURN_START, TURN_END = "<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (PAD, END_OF_TEXT, TURN_START, TURN_END)
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
MAX_POSITIONS = 4096

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Sliding windows shorter than a row, so that Gemma's windowed layers have an effect.
_WINDOW = 64
_GEMMA: dict[str, Any] = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": _WINDOW}
_ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny-llama": ("LlamaConfig", {}),
    "tiny-mistral": ("MistralConfig", {"head_dim": 16, "sliding_window": None}),
    "tiny-qwen2": ("Qwen2Config", {}),
    "tiny-qwen3": ("Qwen3Config", {"head_dim": 16}),
    "tiny-gemma2": ("Gemma2Config", _GEMMA),
    "tiny-gemma3": (
        "Gemma3TextConfig",
        {**_GEMMA, "layer_types": ["sliding_attention", "full_attention"], "tie_word_embeddings": True},
    ),
    "tiny-phi3": ("Phi3Config", {"original_max_position_embeddings": MAX_POSITIONS}),
    "tiny-smollm": ("LlamaConfig", {"tie_word_embeddings": True}),
}


def tiny_names() -> list[str]:
    return list(_ARCHITECTURES)


def tiny_config(name: str) -> dict[str, Any]:
    """The config.json of `name`."""
    class_name, extra = _ARCHITECTURES[name]
    family = class_name.removesuffix("Config").lower().replace("gemma3text", "gemma3_text")
    token_ids = {token: 256 + index for index, token in enumerate(SPECIAL_TOKENS)}
    return {
        "model_type": family,
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_POSITIONS,
        "bos_token_id": token_ids[END_OF_TEXT],
        "eos_token_id": token_ids[TURN_END],
        "pad_token_id": token_ids[PAD],
        **extra,
    }


def make_tiny(name: str, folder: Path, progress: Callable[[str], None] = print) -> None:
    """Write model and tokenizer of `name` into `folder`, in fp32, loadable by plain transformers."""
    import torch
    import transformers

    class_name, _ = _ARCHITECTURES[name]
    settings = {key: value for key, value in tiny_config(name).items() if key != "model_type"}
    with quietly():
        config = getattr(transformers, class_name)(**settings)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _fill(model)
        model.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)


def _fill(model: Any) -> None:
    """Draw every parameter from a generator seeded with its name: independent of creation order and library version.

    Matrices are scaled by 1/sqrt(fan_in), so that activations and logits are large enough to reveal errors; norms and
    biases are moved off their initial values for the same reason.
    """
    import torch

    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        noise = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            if parameter.dim() < 2:
                parameter.add_(0.05 * noise)
            elif "embed" in name:
                parameter.copy_(0.05 * noise)
                parameter[VOCAB_SIZE - len(SPECIAL_TOKENS)] = 0  # <|pad|>
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)


def byte_tokenizer() -> Any:
    """A byte-level BPE without merges: token id = byte value; 256.. are the special tokens. Any text round-trips."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {character: byte for byte, character in _byte_characters().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=TURN_END,
        bos_token=END_OF_TEXT,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHATML_TEMPLATE
    return fast


def _byte_characters() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte: printable Latin-1 maps to itself, the rest to 256 and up."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    characters = {byte: chr(byte) for byte in printable}
    for offset, byte in enumerate(byte for byte in range(256) if byte not in characters):
        characters[byte] = chr(256 + offset)
    return characters
