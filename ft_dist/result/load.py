"""Load a finished run, an adapter or any model with plain transformers and peft, for inference."""

import contextlib
import difflib
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ft_dist.checkpoint.commit.format import MANIFEST, step_of
from ft_dist.checkpoint.find import Step, commit_of_step
from ft_dist.checkpoint.identity import base_difference, base_model
from ft_dist.checkpoint.state import BaseRecord
from ft_dist.config import RunConfig, load_config
from ft_dist.errors import ModelError
from ft_dist.model.builtin import Progress, builtin_names, local_folder, may_be_model, resolve_model
from ft_dist.model.facts import check_weights, read_json
from ft_dist.model.quiet import quietly
from ft_dist.model.tokenizer import load_tokenizer, stop_token_ids
from ft_dist.outside import Document, expand_home, parse_document, validated
from ft_dist.run_folder import RunFolder

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class Weights:
    """Where weights are: `folder` (or hub id) of a model or adapter, and the config of the run that trained them."""

    folder: str
    base: str | None
    """Folder or hub id of an adapter's base; None for a complete model"""
    config: RunConfig | None
    trust_remote_code: bool = False
    """Whether the caller allows code from these folders to run; what a run's own config says does not count"""

    @property
    def revision(self) -> str | None:
        return self.config.model.revision if self.config else None


@dataclass(frozen=True, slots=True)
class Finished:
    """A model in evaluation mode with its tokenizer; `notes` are for the user."""

    model: Any
    tokenizer: Any
    notes: list[str]
    config: RunConfig | None


def find_weights(path: str, progress: Progress = print, *, trust_remote_code: bool = False) -> Weights:
    """Resolve `path`: a run folder (its `final/`), an adapter folder, a model folder, a built-in name or a hub id.

    `trust_remote_code` allows code from there to run. Raises ModelError naming what is missing, and for an adapter of
    a run whose base is no longer the one it was trained on.
    """
    folder = expand_home(path, error=ModelError)
    if not folder.is_dir() and not may_be_model(path):
        raise ModelError(
            f"{path}: no such folder.{_nearest(folder)} Name a run folder, a model folder, a built-in model or a hub "
            "id (org/name)."
        )
    config = None
    run = RunFolder(folder)
    if run.config.is_file():
        config = _config_of(run, trust_remote_code)
        if not run.final.is_dir():
            raise ModelError(
                f"{path}: the run has no final/ folder, so it has not finished. Run ft-dist train again, or use one of "
                "its checkpoints with --step."
            )
        folder = run.final
    elif (step := step_of(folder.absolute().name)) is not None and (folder / MANIFEST).is_file():
        raise ModelError(
            f"{path}: a checkpoint, not a model. Name its run and its step instead: "
            f"{folder.absolute().parents[1]} --step {step}."
        )
    weights = _weights_in(folder, path, config, trust_remote_code, progress)
    if config is not None and weights.base is not None:
        _check_base(run, config, weights.base)
    return weights


def _config_of(run: RunFolder, trust_remote_code: bool) -> RunConfig:
    """The config of a run, which somebody else may have written: only the caller decides whether code may run."""
    config = load_config(str(run.config))
    config.model.trust_remote_code = trust_remote_code
    return config


def _check_base(run: RunFolder, config: RunConfig, base: str) -> None:
    """Versions before the summary had `base` did not store what the adapter was trained on."""
    trained_on = read_json(run.summary).get("base") if run.summary.is_file() else None
    if not isinstance(trained_on, dict):
        return
    now = base_model(config, local_folder(base, config.model.revision))
    before = validated(trained_on, BaseRecord, where=f"{run.summary}: base", error=ModelError)
    if difference := base_difference(before, now):
        raise ModelError(
            f"model.path={config.model.path}: {difference}, on which the adapter in {run.final} was trained. Restore "
            f"the model, or set model.path in {run.config} to a folder that holds it as it was."
        )


@contextlib.contextmanager
def trained_weights(
    path: str,
    *,
    step: Step | None = None,
    near: Path | None = None,
    trust_remote_code: bool = False,
    progress: Progress = print,
) -> Iterator[Weights]:
    """`find_weights`, or with `step` the weights of that commit of the run in `path`.

    A commit becomes a temporary folder in the form of `final/`, inside the folder `near` (None: that for temporary
    files), which is removed at the end of the block. Raises ModelError, CheckpointError.
    """
    if step is None:
        yield find_weights(path, progress, trust_remote_code=trust_remote_code)
        return
    from safetensors import SafetensorError

    from ft_dist.result.from_commit import write_commit

    run = RunFolder(expand_home(path, error=ModelError))
    if not run.config.is_file():
        raise ModelError(f"{path}: not a run folder (no config.yaml), so it has no step {step}. Leave out --step.")
    config = _config_of(run, trust_remote_code)
    commit = commit_of_step(run.checkpoints, step)
    if step == "best":
        progress(f"step {commit.step} has the lowest held-out loss of the checkpoints")
    with contextlib.ExitStack() as stack:
        try:
            temporary = stack.enter_context(
                tempfile.TemporaryDirectory(prefix=f".ft-dist-step-{commit.step}-", dir=near)
            )
            write_commit(commit, config, Path(temporary), base=resolve_model(config.model.path, progress))
        except (OSError, SafetensorError) as error:
            raise not_written(near or tempfile.gettempdir(), error) from None
        yield _weights_in(Path(temporary), path, config, trust_remote_code, progress)


def not_written(place: str | Path, error: Exception) -> ModelError:
    """For an OSError or SafetensorError; of the many that copying a folder can raise, the first."""
    if isinstance(error, shutil.Error):
        return ModelError(f"{place}: cannot be written ({error.args[0][0][2]}).")
    return ModelError(f"{place}: cannot be written ({getattr(error, 'strerror', None) or error}).")


def _weights_in(folder: Path, path: str, config: RunConfig | None, trusted: bool, progress: Progress) -> Weights:
    if not (folder / ADAPTER_CONFIG).is_file():
        return Weights(str(folder) if config else resolve_model(path, progress), None, config, trusted)
    adapter = _adapter_config(folder)
    base = config.model.path if config is not None else adapter.base_model_name_or_path
    if not base:
        raise ModelError(f"{folder / ADAPTER_CONFIG}: has no base_model_name_or_path, so the adapter has no base.")
    return Weights(str(folder), resolve_model(base, progress), config, trusted)


def _nearest(folder: Path) -> str:
    """The built-in model or sibling whose name is closest to that of a missing folder."""
    siblings = [str(place) for place in folder.parent.glob("*") if place.is_dir()]
    near = difflib.get_close_matches(str(folder), [*siblings, *builtin_names()], n=1)
    return f" Did you mean {near[0]}?" if near else ""


def load_finished(
    path: str,
    *,
    step: Step | None = None,
    device: Any = None,
    trust_remote_code: bool = False,
    progress: Progress = print,
) -> Finished:
    """Load `path` (see `trained_weights`) for inference. Raises ModelError, CheckpointError."""
    with trained_weights(path, step=step, trust_remote_code=trust_remote_code, progress=progress) as weights:
        return load_for_inference(weights, device=device)


def load_for_inference(weights: Weights, *, device: Any = None) -> Finished:
    """The model in the dtype of the run, otherwise in bf16 on a GPU and fp32 on a CPU. Raises ModelError."""
    import torch

    from ft_dist.model.load import DTYPES

    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    trained = weights.config.model.dtype if weights.config else None
    dtype = DTYPES[trained or ("bf16" if device.type == "cuda" else "fp32")]
    tokenizer, notes = load_tokenizer(
        tokenizer_folder(weights), trust_remote_code=weights.trust_remote_code, revision=weights.revision
    )
    model = load_weights(weights, dtype=dtype, vocabulary=len(tokenizer)).to(device).eval()
    own = model.generation_config
    own.eos_token_id, own.pad_token_id = stop_token_ids(tokenizer, own.eos_token_id), tokenizer.pad_token_id
    return Finished(model, tokenizer, notes, weights.config)


def tokenizer_folder(weights: Weights) -> str:
    """A run saves its tokenizer; an adapter from elsewhere may have none."""
    if weights.base is not None and not (Path(weights.folder) / "tokenizer_config.json").is_file():
        return weights.base
    return weights.folder


def load_weights(weights: Weights, *, dtype: Any, vocabulary: int) -> Any:
    """The model in `dtype` on the CPU, an adapter applied but not merged; embeddings grown to `vocabulary` rows.

    What the model keeps in fp32 (a router's bias) stays in fp32, and so does an adapter that was trained in fp32.
    Raises ModelError if files are missing, damaged or inconsistent, if a weight would be random, or if the adapter
    holds a tensor that nothing reads.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from ft_dist.model.anatomy.weights import check_loaded, reason_of
    from ft_dist.model.parts.new_tokens import run_token_rows

    source = weights.base or weights.folder
    if Path(source).is_dir():
        check_weights(Path(source))
    try:
        with quietly(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # from peft, about tied and resized embeddings, which are handled below
            model, found = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=dtype,
                trust_remote_code=weights.trust_remote_code,
                # the revision applies to the hub's repository, not to the saved folder
                revision=weights.revision if weights.base else None,
                use_safetensors=True,  # other files can hold code
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that they are listed
            )
            check_loaded(found, model, source)
            if weights.base is None:
                return model
            import peft
            from safetensors.torch import load_file

            _grow_as_in_training(model, vocabulary, weights.config)
            adapted = peft.PeftModel.from_pretrained(model, weights.folder)
            stored = load_file(Path(weights.folder) / ADAPTER_WEIGHTS)
            _check_adapter(adapted, stored, weights)
            _in_trained_dtype(adapted, {name: tensor.dtype for name, tensor in stored.items()}, dtype)
            run_token_rows(adapted)
            return adapted
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelError(f"{weights.folder}: cannot be loaded on {source} ({reason_of(error)}).") from None


def _grow_as_in_training(model: Any, vocabulary: int, config: RunConfig | None) -> None:
    """New rows that nothing trains are random: padding that the softmax sees. A run draws them from its seed."""
    import torch

    from ft_dist.model.load import grow_embeddings

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed if config else 0)
        grow_embeddings(model, vocabulary)


def _check_adapter(adapted: Any, stored: dict[str, Any], weights: Weights) -> None:
    from ft_dist.method.lora import lost_tensors

    if lost := lost_tensors(adapted, stored):
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise ModelError(
            f"{weights.folder}: peft would not load {lost[0]}{more} on {weights.base}, so the model would not be the "
            "trained one. Name the base that the adapter was trained on; if transformers renames these layers, train "
            "again with method.exclude_modules."
        )


def _in_trained_dtype(adapted: Any, stored: dict[str, Any], dtype: Any) -> None:
    """peft loads adapters in fp32. Cast each tensor to the dtype that its file has `stored`, in which training
    computed, unless the base is in a wider one."""
    import torch

    for name, parameter in adapted.named_parameters():
        written = name.replace(f".{adapted.active_adapter}", "")
        found = stored.get(written, stored.get(written.removesuffix(".weight")))
        if found is not None:
            parameter.data = parameter.data.to(torch.promote_types(found, dtype))


class AdapterConfig(Document):
    """What we use of an adapter's config; peft reads the rest."""

    base_model_name_or_path: str | None = None
    megatron_config: None = None
    """With it, peft would import the module that `megatron_core` names"""


def _adapter_config(adapter: Path) -> AdapterConfig:
    where = adapter / ADAPTER_CONFIG
    try:
        content = where.read_bytes()
    except OSError as error:
        raise ModelError(f"{where}: cannot be read ({error.strerror}).") from None
    if not (adapter / ADAPTER_WEIGHTS).is_file():  # peft would take a pickled file instead
        raise ModelError(f"{adapter}: no {ADAPTER_WEIGHTS}. Weights must be safetensors; pickled files are not read.")
    return parse_document(content, AdapterConfig, where=where, error=ModelError)
