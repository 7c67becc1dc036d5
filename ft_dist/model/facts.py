"""Facts about a model folder from config.json and the safetensors headers, without torch or weights.

Enough to check a config before a GPU is allocated. Names in the files may not be those of the loaded model's layers.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveInt

from ft_dist.errors import ModelError
from ft_dist.outside import Document, check_name, parse_object, validated

_MAX_HEADER_BYTES = 100 * 1024 * 1024  # the limit of the safetensors format
_DTYPES = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16"}


_BITS = {"F4": 4, "F8_E8M0": 8, "F8_E4M3": 8, "F8_E5M2": 8, "BOOL": 8, "I8": 8, "U8": 8, "C64": 64}
_BITS |= {"F6_E2M3": 6, "F6_E3M2": 6}
_BITS |= {f"{kind}{bits}": bits for kind in ("F", "I", "U") for bits in (16, 32, 64)} | {"BF16": 16}
_MAX_JSON_BYTES = 100 * 1024 * 1024
_MAX_JSON_DEPTH = 64
MOST_LAYERS = 10_000
INDEX = "model.safetensors.index.json"

_TEXT_PARTS = ("language_model", "text_model", "embed_tokens", "layers", "norm", "lm_head")


class _TextConfig(Document):
    max_position_embeddings: PositiveInt | None = None


class _Config(_TextConfig):
    """What we use of a config.json; transformers reads the rest."""

    text_config: _TextConfig | None = None
    architectures: list[Annotated[str, Field(pattern=r"^\w+$")]] | None = None


class _Index(Document):
    weight_map: dict[str, str]


class _Tensor(Document):
    dtype: Annotated[str, Field(pattern=r"^\w{1,16}$")]
    shape: Annotated[list[Annotated[int, Field(ge=0, lt=2**63)]], Field(max_length=16)]
    data_offsets: Annotated[list[Annotated[int, Field(ge=0, lt=2**63)]], Field(min_length=2, max_length=2)]


class _Header(Document):
    tensors: dict[str, _Tensor]


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
    tree = read_json(folder / "config.json")
    _check_layers(tree, folder)
    whole = validated(tree, _Config, where=folder / "config.json", error=ModelError)
    config = whole.text_config or whole  # a multimodal model nests the language model's config
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, int] = {}
    for file in _weight_files(folder):
        for name, tensor in _read_header(file).items():
            shapes[name] = tuple(tensor.shape)
            dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + math.prod(tensor.shape)
    index = folder / INDEX
    absent = sorted(_weight_map(index).keys() - shapes.keys()) if index.is_file() else []
    if absent or not shapes:
        raise ModelError(
            f"model.path={folder}: {_shown(absent[0]) if absent else 'its weights'}: in none of its weight files."
        )
    dtype = max(dtypes, key=lambda code: dtypes[code])
    return ModelFacts(
        total_parameters=sum(math.prod(shape) for shape in shapes.values()),
        dtype=_DTYPES.get(dtype, dtype.lower()),
        max_positions=config.max_position_embeddings,
        architecture=(whole.architectures or ["unknown"])[0],
        other_parts=_other_parts(shapes) if whole.text_config else {},
    )


def _check_layers(tree: dict[str, Any], folder: Path) -> None:
    """transformers makes lists, and then modules, as long as a config.json says, until the memory is full."""
    for name, value in tree.items():
        if isinstance(value, dict):
            _check_layers(value, folder)
        elif "layer" in name and isinstance(value, int) and value > MOST_LAYERS:
            shown = f"{value:,}" if value < 10**15 else "a longer number"
            raise ModelError(f"model.path={folder}: {name[:80]}={shown} in its config.json, which no model can have.")


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
    index = folder / INDEX
    if index.is_file():
        files = [folder / name for name in sorted(set(_weight_map(index).values()))]
    else:
        files = [folder / "model.safetensors"]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise ModelError(
            f"model.path={folder}: no {', '.join(missing[:3]) or 'weights'}. "
            "Weights must be safetensors; pickled .bin files are not read."
        )
    return files


def _weight_map(index: Path) -> dict[str, str]:
    """File of each tensor. Raises ModelError if a file is not below the model's folder."""
    tree = validated(read_json(index), _Index, where=index, error=ModelError)
    for name in set(tree.weight_map.values()):
        check_name(name, where=index, error=ModelError)
    return tree.weight_map


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model folder. Raises ModelError."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ModelError(f"{path}: more than {_MAX_JSON_BYTES:,} bytes.")
        content = path.read_bytes()
    except FileNotFoundError:
        raise ModelError(f"model.path={path.parent}: has no {path.name}.") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}).") from None
    tree = parse_object(content, where=path, error=ModelError)
    level: list[Any] = [tree]
    for _ in range(_MAX_JSON_DEPTH):
        level = [each for node in level for each in (node.values() if isinstance(node, dict) else node)]
        level = [each for each in level if isinstance(each, dict | list)]
        if not level:
            return tree
    raise ModelError(f"{path}: more than {_MAX_JSON_DEPTH} levels of JSON.")


def count_tensors(folder: Path) -> int | None:
    """Tensors in the weight files of a model's folder; None if it holds no weights. Raises ModelError."""
    return sum(len(_read_header(file)) for file in _weight_files(folder)) if holds_weights(folder) else None


def check_weights(folder: Path) -> None:
    """Raise ModelError if a weight file of the model in `folder` is missing or its header is damaged."""
    for file in _weight_files(folder):
        _read_header(file)


def _read_header(file: Path) -> "dict[str, _Tensor]":
    """The tensors of a safetensors file, whose bytes follow each other without gap or overlap up to its end.

    https://github.com/huggingface/safetensors#format: u64 little-endian length, then a JSON object.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= _MAX_HEADER_BYTES:
                raise ModelError(f"{file}: not a safetensors file (its header says {length} bytes). Download it again.")
            header = stream.read(length)
    except OSError as error:
        raise ModelError(f"{file}: cannot be read ({error.strerror}).") from None
    if len(header) < length:
        raise ModelError(f"{file}: has {size} of {8 + length} bytes. Download it again.")
    tree = parse_object(header, where=f"{file}, its header", error=ModelError)
    tree.pop("__metadata__", None)
    tensors = validated({"tensors": tree}, _Header, where=f"{file}, its header", error=ModelError).tensors
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_offsets):
        begin, stop = tensor.data_offsets
        bits = _BITS.get(tensor.dtype)
        if bits is None:
            raise ModelError(f"{file}: its header is damaged: {_shown(name)} is of the unknown type {tensor.dtype}.")
        if begin != end or stop < begin or stop - begin != -(-math.prod(tensor.shape) * bits // 8):
            raise ModelError(
                f"{file}: its header is damaged: {_shown(name)} of {tensor.dtype}{tensor.shape} is at bytes "
                f"{begin} to {stop}. Download it again."
            )
        end = stop
    if size != 8 + length + end:
        raise ModelError(f"{file}: has {size} of {8 + length + end} bytes. Download it again.")
    return tensors


def _shown(name: str) -> str:
    text = ascii(name)
    return text if len(text) <= 120 else f"{text[:117]}..."
