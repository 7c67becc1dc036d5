"""config.json of published models (the keys that the plan reads), and folders that contain only that file."""

import json
from pathlib import Path
from typing import Any

from ft_dist.model.shape import ModelShape, shape_of_config

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}


def shape(config: dict[str, Any]) -> ModelShape:
    return shape_of_config(config, "test")


def folder(config: dict[str, Any], path: Path) -> Path:
    """A model folder without weights."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return path
