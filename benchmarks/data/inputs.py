"""Synthetic chats of any size, and a BPE tokenizer trained on them: no downloads, the same on every machine."""

import json
from pathlib import Path
from typing import Any

import numpy as np

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_LETTERS = np.array(list("etaoinshrdlucmfwypvbgk"))


def write_chats(path: Path, size_bytes: int, *, seed: int = 0) -> None:
    """JSON lines of about `size_bytes`: words by Zipf's law, lengths log-normal like those of Alpaca."""
    generator = np.random.default_rng(seed)
    lengths = np.minimum(1 + generator.geometric(0.25, 20_000), 14)
    words = np.array(["".join(generator.choice(_LETTERS, length)) for length in lengths.tolist()])
    weights = 1 / np.arange(2, len(words) + 2)
    written = 0
    with path.open("w", encoding="utf-8") as file:
        while written < size_bytes:
            counts = np.clip(generator.lognormal(4.6, 0.7, 500).astype(int), 8, 1200)
            text = words[generator.choice(len(words), int(counts.sum()), p=weights / weights.sum())]
            for part in np.split(text, np.cumsum(counts)[:-1]):
                cut = len(part) // 3
                turns = [("user", " ".join(part[:cut])), ("assistant", " ".join(part[cut:]))]
                line = json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]})
                written += file.write(line + "\n")


def train_tokenizer(path: Path) -> Any:
    """A byte-level BPE of 8,192 tokens with ChatML, from the first two megabytes of a file."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    with path.open(encoding="utf-8") as file:
        sample = file.read(2_000_000).splitlines()
    trainer = trainers.BpeTrainer(
        vocab_size=8192, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator(sample, trainer)
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=special[2], pad_token=special[0])
    tokenizer.chat_template = TEMPLATE
    return tokenizer
