"""Facts about a model folder from config.json and the safetensors headers, without torch or weights.

Enough to check a config before a GPU is allocated: layer names for `method.target_modules`, sizes for memory planning.
"""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ft_dist.errors import ModelError

_MAX_HEADER_BYTES = 100 * 1024 * 1024  # the limit of the safetensors format
_DTYPES = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16"}


_TEXT_PARTS = ("language_model", "text_model", "embed_tokens", "layers", "norm", "lm_head")


@dataclass(frozen=True)
class ModelFacts:
    """`shapes` maps each stored tensor's name to its shape; tied output embeddings are stored and counted once.

    `other_parts`: parameters of each part of a multimodal model that is not its text model, by the part's name.
    """

    shapes: dict[str, tuple[int, ...]]
    linear_modules: list[str]
    total_parameters: int
    dtype: str
    max_positions: int | None
    vocab_size: int
    hidden_size: int
    layers: int
    architecture: str
    model_type: str
    tied_embeddings: bool
    other_parts: dict[str, int]


def model_facts(folder: str | Path) -> ModelFacts:
    """Read the facts of a local model folder with safetensors weights.

    Raises ModelError naming the file that is missing or damaged.
    """
    folder = Path(folder)
    whole = _read_json(folder / "config.json")
    config = whole.get("text_config", whole)  # a multimodal model nests the language model's config
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, int] = {}
    for file in _weight_files(folder):
        for name, entry in _read_header(file).items():
            if name == "__metadata__":
                continue
            shapes[name] = tuple(entry["shape"])
            dtypes[entry["dtype"]] = dtypes.get(entry["dtype"], 0) + math.prod(entry["shape"])
    dtype = max(dtypes, key=lambda code: dtypes[code])
    tied = bool(config.get("tie_word_embeddings", whole.get("tie_word_embeddings", False)))
    vocab_size = int(config.get("vocab_size", 0))
    return ModelFacts(
        shapes=shapes,
        linear_modules=_linear_modules(shapes),
        total_parameters=sum(math.prod(shape) for shape in shapes.values()),
        dtype=_DTYPES.get(dtype, dtype.lower()),
        max_positions=config.get("max_position_embeddings"),
        vocab_size=vocab_size,
        hidden_size=int(config.get("hidden_size", 0)),
        layers=int(config.get("num_hidden_layers", 0)),
        architecture=(whole.get("architectures") or ["unknown"])[0],
        model_type=str(config.get("model_type", whole.get("model_type", "unknown"))),
        tied_embeddings=tied or not any(name.endswith("lm_head.weight") for name in shapes),
        other_parts=_other_parts(shapes) if "text_config" in whole else {},
    )


def _other_parts(shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    parts: dict[str, int] = {}
    for name, shape in shapes.items():
        part = name.removeprefix("model.").partition(".")[0]
        if part not in _TEXT_PARTS:
            parts[part] = parts.get(part, 0) + math.prod(shape)
    return parts


def _linear_modules(shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """Modules with a 2-D weight that is neither an embedding nor the output head (peft's all-linear skips it too)."""
    modules = []
    for name, shape in shapes.items():
        module, _, kind = name.rpartition(".")
        leaf = module.rpartition(".")[2]
        if kind == "weight" and len(shape) == 2 and "embed" not in leaf and leaf not in ("lm_head", "wte", "wpe"):
            modules.append(module)
    return modules


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = [folder / name for name in sorted(set(_read_json(index).get("weight_map", {}).values()))]
    else:
        files = [folder / "model.safetensors"]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise ModelError(
            f"model.path={folder}: no {', '.join(missing) or 'weights'}. "
            "Weights must be safetensors; pickled .bin files are not read."
        )
    return files


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"model.path={path.parent}: has no {path.name}.") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not readable as JSON ({error}).") from None
    if not isinstance(tree, dict):
        raise ModelError(f"{path}: contains {type(tree).__name__}, not a JSON object.")
    return tree


def _read_header(file: Path) -> dict[str, Any]:
    """https://github.com/huggingface/safetensors#format: u64 little-endian length, then a JSON object."""
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= _MAX_HEADER_BYTES:
            raise ModelError(f"{file}: not a safetensors file (its header says {length} bytes). Download it again.")
        header = stream.read(length)
    try:
        tree = json.loads(header)
        needed = 8 + length + max(entry["data_offsets"][1] for name, entry in tree.items() if name != "__metadata__")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{file}: its safetensors header is damaged. Download it again.") from None
    if file.stat().st_size < needed:
        raise ModelError(f"{file}: has {file.stat().st_size} of {needed} bytes. Download it again.")
    return tree
