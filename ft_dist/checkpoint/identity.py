"""The identity of a checkpoint's run: its config, and the base weights it was trained on.

A resumed run may change its config, and the changes are logged. Changes that would alter the meaning of the saved state
are refused.
"""

import json
import struct
from pathlib import Path
from typing import Any

import xxhash

from ft_dist.config.schema import RunConfig
from ft_dist.errors import NEW_RUN, CheckpointError
from ft_dist.method.table import METHODS, own_options

FIXED = (
    "model.new_tokens",
    "method.kind",
)
"""Keys that define the saved tensors of every method; each method adds its own `fixed_keys`"""
_SAMPLES = 64
_SAMPLE_BYTES = 1 << 20


def identity(config: RunConfig, *, folder: str) -> dict[str, Any]:
    """For state.json: the config, its hash, and the base model loaded from `folder` (or hub id)."""
    tree = config.model_dump(mode="json")
    return {"config": tree, "config_hash": config_hash(tree), "base": base_model(config, folder)}


def config_hash(tree: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(tree, sort_keys=True).encode())


def base_model(config: RunConfig, folder: str) -> dict[str, Any]:
    """Name and digest of the base weights; the digest is None if only the hub has them."""
    name = {"path": config.model.path, "revision": config.model.revision}
    return name | {"digest": weights_digest(Path(folder)) if Path(folder).is_dir() else None}


def weights_digest(folder: Path) -> str:
    """xxh3-128 over name, size, safetensors header and 64 evenly spaced MiB of every weight file.

    Detects another model, or further training of the same one, in a fraction of a second even for hundreds of
    gigabytes; it is not meant to find a single flipped bit.
    """
    digest = xxhash.xxh3_128()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
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
    if "epochs" not in config.optim.model_fields_set and before.get("max_steps") == config.optim.max_steps:
        config.optim.epochs = before.get("epochs")


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
    digests = saved["base"]["digest"], now["base"]["digest"]
    # after full fine-tuning the checkpoint holds every weight, so the base no longer matters
    if method.frozen_base and None not in digests and digests[0] != digests[1]:
        raise CheckpointError(
            f"model.path={now['base']['path']}: its weights differ from those of {saved['base']['path']}, on which the "
            f"adapters in {where} were trained. Restore them, or {NEW_RUN}."
        )
    return [f"{key}: {_short(before)} -> {_short(after)}" for key, (before, after) in changes.items()]


def config_changes(before: dict[str, Any], after: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """`differences` of two configs, without the options of other methods in configs of older full runs."""
    return differences(_own_options_only(before), _own_options_only(after))


def _own_options_only(tree: dict[str, Any]) -> dict[str, Any]:
    return tree | {"method": own_options(tree["method"])} if "method" in tree else tree


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
