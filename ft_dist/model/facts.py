"""Facts about a model folder from config.json and the safetensors headers, without torch or weights.

Enough to check a config before a GPU is allocated. Names in the files may not be those of the loaded model's layers.
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
    """Tied output embeddings are stored and counted once.

    `other_parts`: parameters of each part of a multimodal model that is not its text model, by the part's name.
    """

    total_parameters: int
    dtype: str
    max_positions: int | None
    architecture: str
    other_parts: dict[str, int]


def model_facts(folder: str | Path) -> ModelFacts:
    """Read the facts of a local model folder with safetensors weights.

    Raises ModelError naming the file that is missing or damaged, and for a folder that also holds an adapter.
    """
    folder = Path(folder)
    refuse_adapter_inside(folder)
    whole = read_json(folder / "config.json")
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
    return ModelFacts(
        total_parameters=sum(math.prod(shape) for shape in shapes.values()),
        dtype=_DTYPES.get(dtype, dtype.lower()),
        max_positions=config.get("max_position_embeddings"),
        architecture=(whole.get("architectures") or ["unknown"])[0],
        other_parts=_other_parts(shapes) if "text_config" in whole else {},
    )


def holds_weights(folder: Path) -> bool:
    """Whether all safetensors weights of a model are in its folder."""
    try:
        return bool(_weight_files(folder))
    except ModelError:
        return False


def refuse_adapter_inside(folder: Path) -> None:
    """Raise ModelError for a folder with a model and an adapter: transformers adds the adapter to the model on load,
    and freezes the model."""
    if (folder / "adapter_config.json").is_file() and holds_weights(folder):
        raise ModelError(adapter_inside(str(folder)))


def adapter_inside(path: str) -> str:
    return (
        f"model.path={path}: holds an adapter as well as a model, and transformers would add it on load. Move "
        "adapter_config.json and adapter_model.safetensors to a folder of their own; ft-dist export merges it with its "
        "model."
    )


def _other_parts(shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    parts: dict[str, int] = {}
    for name, shape in shapes.items():
        part = name.removeprefix("model.").partition(".")[0]
        if part not in _TEXT_PARTS:
            parts[part] = parts.get(part, 0) + math.prod(shape)
    return parts


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
    else:
        files = [folder / "model.safetensors"]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise ModelError(
            f"model.path={folder}: no {', '.join(missing) or 'weights'}. "
            "Weights must be safetensors; pickled .bin files are not read."
        )
    return files


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model folder. Raises ModelError."""
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
