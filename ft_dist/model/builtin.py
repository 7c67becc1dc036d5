"""`model.path` to a folder: built-in models are created once in a cache; folders and hub ids pass through.

Nothing here imports torch or transformers unless a model has to be created, so errors in `model.path` appear
immediately. The cache is `$FT_DIST_CACHE/models` (default `~/.cache/ft_dist/models`): a model is created in a temporary
sibling folder under a lock and renamed into place when every file is on disk. A kill at any moment leaves only a
temporary folder, which the next call removes.
"""

import difflib
import os
import re
from collections.abc import Callable
from pathlib import Path

from ft_dist.errors import ModelError
from ft_dist.model.facts import holds_weights, refuse_adapter_inside
from ft_dist.model.folder import whole_folder
from ft_dist.model.tiny import tiny_names
from ft_dist.outside import expand_home

SMOLLM2 = "smollm2-135m"
# Part of the folder's name: increment it when the created files change.
_VERSIONS = {SMOLLM2: "0.1.2-1", **dict.fromkeys(tiny_names(), "1")}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]
_HUB_TIMEOUT_S = 2.5

Progress = Callable[[str], None]


def builtin_names() -> list[str]:
    """Names usable as `model.path` without any folder or hub."""
    return list(_VERSIONS)


def cached_folder(name: str) -> Path | None:
    """The folder of a built-in model, or None if it is not in the cache. Creates nothing."""
    folder = cache_dir() / "models" / f"{name}-{_VERSIONS[name]}"
    return folder if folder.is_dir() else None


def may_be_model(path: str) -> bool:
    """True for a built-in name, and for what may be a hub id: `runs/x` is not one if there is a folder `runs`."""
    return path in _VERSIONS or (bool(_HUB_ID.fullmatch(path)) and not Path(path).parent.is_dir())


def resolve_model(path: str, progress: Progress = print) -> str:
    """The folder or hub id that `model.path` refers to; a built-in model is created if it is not in the cache.

    Raises ModelError for a folder without config.json or with an adapter besides the model, and for anything but a
    folder, built-in name or hub id.
    """
    folder = expand_home(path, error=ModelError)
    if folder.is_dir() and path not in _VERSIONS:
        if not (folder / "config.json").is_file():
            raise ModelError(f"model.path={path}: the folder has no config.json, so it is not a Hugging Face model.")
        refuse_adapter_inside(folder)
        return str(folder)
    if path in _VERSIONS:
        return str(_make_once(path, progress))
    if _HUB_ID.fullmatch(path):
        return path
    near = difflib.get_close_matches(path, _VERSIONS, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    names = ", ".join(_VERSIONS)
    raise ModelError(
        f"model.path={path}: no such folder, and not a built-in name ({names}) or hub id (org/name).{hint}"
    )


def local_folder(path: str, revision: str | None = None) -> str:
    """The folder of what `resolve_model` returns: for a hub id, its snapshot in the hub's cache.

    A hub id whose weights are not in the cache, such as one that is not loaded yet, stays as it is.
    """
    if Path(path).is_dir():
        return path
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(path, "config.json", revision=revision)
    folder = Path(config).parent if isinstance(config, str) else None
    return str(folder) if folder and holds_weights(folder) else path


def fetch(name: str, progress: Progress = print) -> Path:
    """Download a built-in model or a hub id and return its folder; a second call costs nothing.

    Raises ModelError when it does not exist or cannot be reached.
    """
    resolved = resolve_model(name, progress)
    if Path(resolved).is_dir():
        return Path(resolved)
    from huggingface_hub import snapshot_download

    progress(f"{name}: downloading from the hub")
    try:
        return Path(snapshot_download(resolved, allow_patterns=_HUB_FILES))
    except (OSError, ValueError) as error:  # huggingface_hub's errors derive from these
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise ModelError(f"model.path={name}: the download failed ({type(error).__name__}: {reason}).") from None


def check_hub(hub_id: str, revision: str | None = None) -> None:
    """Ask the hub once, waiting a few seconds at most, whether it has this model; a cached model is not checked.

    transformers would retry for more than a minute if the name does not exist or the network is down. Raises ModelError
    saying which of the two it is.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(try_to_load_from_cache(hub_id, "config.json", revision=revision), str):
        return
    if constants.HF_HUB_OFFLINE:
        raise ModelError(
            f"model.path={hub_id}: no such folder, and not in the hub's cache on this machine (HF_HUB_OFFLINE is set). "
            f"Run ft-dist fetch {hub_id} online, or name a folder."
        )
    try:
        HfApi().model_info(hub_id, revision=revision, timeout=_HUB_TIMEOUT_S)
    except GatedRepoError:
        raise ModelError(
            f"model.path={hub_id}: accept its licence on the model's page first, then run hf auth login."
        ) from None
    except RevisionNotFoundError:
        raise ModelError(f"model.path={hub_id}: no revision {revision} on the hub. Check model.revision.") from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"model.path={hub_id}: no such folder, and the hub has no such model that you can access. "
            "Check the spelling; for a private model run hf auth login."
        ) from None
    except Exception as error:  # the HTTP library's errors for an unreachable network
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise ModelError(
            f"model.path={hub_id}: no such folder, and the hub cannot be reached ({type(error).__name__}: {reason}). "
            "Name a folder or a built-in model, or fix the network."
        ) from None


def cache_dir() -> Path:
    """`$FT_DIST_CACHE`, or `~/.cache/ft_dist`."""
    return expand_home(os.environ.get("FT_DIST_CACHE") or "~/.cache/ft_dist", error=ModelError)


def _make_once(name: str, progress: Progress) -> Path:
    models = cache_dir() / "models"
    final = models / f"{name}-{_VERSIONS[name]}"
    if final.is_dir():  # only a rename creates it, so it is complete
        return final
    from filelock import FileLock

    try:
        models.mkdir(parents=True, exist_ok=True)
        with FileLock(models / f".{name}.lock"):
            if not final.is_dir():
                _make(name, final, progress)
    except OSError as error:
        raise ModelError(
            f"model.path={name}: cannot write its cache {final} ({error.strerror or error}). "
            "Set FT_DIST_CACHE to a writable folder."
        ) from None
    return final


def _make(name: str, final: Path, progress: Progress) -> None:
    """Caller holds the lock."""
    if name == SMOLLM2:
        from ft_dist.model.smollm import make_smollm2 as make
    else:
        from ft_dist.model.tiny import make_tiny as make
    with whole_folder(final) as temporary:
        make(name, temporary, progress)
