"""The identity of a checkpoint's run: its config, and the base model it was trained on.

A resumed run may change its config, and the changes are logged. Changes that would alter the meaning of the saved state
are refused.
"""

import json
import struct
from functools import cache
from pathlib import Path
from typing import Any

import xxhash

from ft_dist.checkpoint.commit.format import fingerprint
from ft_dist.checkpoint.state import BaseRecord, WeightFile
from ft_dist.config.schema import RunConfig
from ft_dist.errors import NEW_RUN, CheckpointError, ModelError
from ft_dist.method.table import METHODS, own_options
from ft_dist.model.builtin import cache_dir
from ft_dist.model.facts import read_json
from ft_dist.storage.file_digests import cached_digests

FIXED = (
    "model.new_tokens",
    "method.kind",
)
"""Keys that define the saved tensors of every method; each method adds its own `fixed_keys`"""
_NOT_THE_FUNCTION = ("transformers_version", "use_cache", "_name_or_path", "dtype", "torch_dtype")
"""Keys of config.json that do not change what a run computes; its dtype is `model.dtype`"""
_SAMPLES = 64
_SAMPLE_BYTES = 1 << 20


def identity(config: RunConfig, *, base: BaseRecord) -> dict[str, Any]:
    """For state.json: the config, its hash, and the base model."""
    tree = config.model_dump(mode="json")
    return {"config": tree, "config_hash": config_hash(tree), "base": base}


def config_hash(tree: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(tree, sort_keys=True).encode())


def base_model(config: RunConfig, folder: str, *, whole: bool = True) -> BaseRecord:
    """Name of the base model, and digests of its weights, its config and, if trusted, its code.

    They are None if only the hub has the model; without `whole`, only samples of the weights are read. Raises
    ModelError if its config is not JSON or a file is not readable.
    """
    place, path, revision = Path(folder), config.model.path, config.model.revision
    if not place.is_dir():
        return BaseRecord(path=path, revision=revision)
    try:
        return BaseRecord(
            path=path,
            revision=revision,
            commit=place.resolve().name if place.parent.name == "snapshots" else None,
            files=_whole_files(place) if whole else None,
            digest=sampled_digest(place),
            config_digest=_config_digest(place / "config.json"),
            code_digest=_code_digest(place) if config.model.trust_remote_code else None,
        )
    except OSError as error:
        raise ModelError(
            f"model.path={config.model.path}: {error.filename}: cannot be read ({error.strerror})."
        ) from None


def _config_digest(file: Path) -> str | None:
    """Of what a model's config.json says about its function. Raises ModelError if it is not JSON."""
    return config_hash(_of_function(read_json(file))) if file.is_file() else None


def _code_digest(folder: Path) -> str:
    digest = xxhash.xxh3_128()
    for path in sorted(folder.glob("*.py")):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _of_function(tree: Any) -> Any:
    """A config without the keys that do not count, at any depth: a multimodal model nests one for each part."""
    if isinstance(tree, list):
        return [_of_function(each) for each in tree]
    if not isinstance(tree, dict):
        return tree
    return {key: _of_function(value) for key, value in tree.items() if key not in _NOT_THE_FUNCTION}


def sampled_digest(folder: Path) -> str:
    """xxh3-128 over name, size, safetensors header and 64 evenly spaced MiB of every weight file: all that commits of
    older versions hold."""
    return _sampled(weight_files(folder))


def weight_files(folder: Path) -> tuple[tuple[Path, int, int], ...]:
    """Path, size and time of change (ns) of every weight file."""
    found = [(path, path.stat()) for path in sorted(folder.glob("*.safetensors"))]
    return tuple((path, at.st_size, at.st_mtime_ns) for path, at in found)


def _whole_files(folder: Path) -> dict[str, WeightFile]:
    """Every byte of every weight file. Read once on each machine, at the speed of its disk: see `cached_digests`."""
    files = [path for path, _, _ in weight_files(folder)]
    digests, _ = cached_digests(files, cache_dir() / "weights-digests.json", lambda path: fingerprint(path)["xxh3"])
    return {
        path.name: WeightFile(bytes=path.stat().st_size, xxh3=digest)
        for path, digest in zip(files, digests, strict=True)
    }


@cache
def _sampled(files: tuple[tuple[Path, int, int], ...]) -> str:
    digest = xxhash.xxh3_128()
    for path, size, _ in files:
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) == 8:
                digest.update(file.read(min(struct.unpack("<Q", prefix)[0], size)))
            stride = max(_SAMPLE_BYTES, size // _SAMPLES)
            for at in range(0, size, stride):
                file.seek(at)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def keep_length(config: RunConfig, saved: dict[str, Any] | None) -> None:
    """Give `config` the epochs of the run that it resumes, unless it sets them or changes optim.max_steps.

    Versions in which optim.epochs was 1 unless set stored that 1; with optim.max_steps it would now be unlimited, so
    the run would become longer, and its learning rate another.
    """
    before = (saved or {}).get("optim", {})
    epochs = before.get("epochs")
    if "epochs" not in config.optim.model_fields_set and before.get("max_steps") == config.optim.max_steps:
        config.optim.epochs = epochs if isinstance(epochs, int) else None


def check_identity(saved: dict[str, Any], now: dict[str, Any], *, where: Path) -> list[str]:
    """One line per change since `saved` (both from `identity`). Raises CheckpointError for a change that is not
    allowed."""
    changes = config_changes(saved["config"], now["config"])
    method = METHODS[now["config"]["method"]["kind"]]
    fixed = (*FIXED, *(f"method.{key}" for key in method.fixed_keys))
    for key, (before, after) in changes.items():
        if key in fixed:
            raise CheckpointError(
                f"{key}={after}: the checkpoint {where} was made with {key}={before}, which its tensors depend on. "
                f"Restore it, or {NEW_RUN}."
            )
    difference = base_difference(saved["base"], now["base"])
    if difference:
        what = f"the adapters in {where} were" if method.frozen_base else f"the checkpoint {where} was"
        raise CheckpointError(
            f"model.path={now['base'].path}: {difference}, on which {what} trained. Restore the model, or {NEW_RUN}."
        )
    if saved["base"] and now["base"].commit == saved["base"].commit:  # the revision was pinned
        changes.pop("model.revision", None)
    return [f"{key}: {_short(before)} -> {_short(after)}" for key, (before, after) in changes.items()]


def base_difference(saved: BaseRecord | None, now: BaseRecord) -> str | None:
    """What differs between two base models, or None; what one of them lacks is unknown.

    The weights count after full fine-tuning too: a checkpoint has every trained weight, but not the buffers.
    """
    if saved is None:
        return None
    if saved.files is not None and now.files is not None:
        for name in sorted(saved.files.keys() | now.files.keys()):
            if saved.files.get(name) != now.files.get(name):
                return f"its weights differ from those of {saved.path} ({name})"
    elif None not in (saved.digest, now.digest) and saved.digest != now.digest:
        return f"its weights differ from those of {saved.path}"
    for key, name in (("config_digest", "config.json"), ("code_digest", "Python code")):
        before, after = getattr(saved, key), getattr(now, key)
        if None not in (before, after) and before != after:
            return f"its {name} differs from that of {saved.path}"
    return None


def config_changes(before: dict[str, Any], after: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """`differences` of two configs, without the options of other methods in configs of older full runs."""
    return differences(_own_options_only(before), _own_options_only(after))


def _own_options_only(tree: dict[str, Any]) -> dict[str, Any]:
    method = tree.get("method")
    return tree | {"method": own_options(method)} if isinstance(method, dict) else tree


def differences(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Keys of two config trees whose values differ, in the order of the second; a missing key counts as None."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in dict.fromkeys([*after, *before]):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found |= differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found[f"{prefix}{key}"] = (old, new)
    return found


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
