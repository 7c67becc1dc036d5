"""Load a finished run, an adapter or any model with plain transformers and peft, for inference."""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ft_dist.config import RunConfig, load_config
from ft_dist.errors import ModelError
from ft_dist.model.builtin import Progress, resolve_model
from ft_dist.model.quiet import quietly
from ft_dist.model.tokenizer import load_tokenizer, stop_token_ids
from ft_dist.run_folder import RunFolder

ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True, slots=True)
class Weights:
    """Where weights are: `folder` (or hub id) of a model or adapter, and the config of the run that trained them."""

    folder: str
    base: str | None
    """Folder or hub id of an adapter's base; None for a complete model"""
    config: RunConfig | None

    @property
    def revision(self) -> str | None:
        return self.config.model.revision if self.config else None

    @property
    def trust_remote_code(self) -> bool:
        return self.config.model.trust_remote_code if self.config else False


@dataclass(frozen=True, slots=True)
class Finished:
    """A model in evaluation mode with its tokenizer; `notes` are for the user."""

    model: Any
    tokenizer: Any
    notes: list[str]
    config: RunConfig | None


def find_weights(path: str, progress: Progress = print) -> Weights:
    """Resolve `path`: a run folder (its `final/`), an adapter folder, a model folder, a built-in name or a hub id.

    Raises ModelError naming what is missing.
    """
    folder = Path(path).expanduser()
    config = None
    run = RunFolder(folder)
    if run.config.is_file():
        config = load_config(str(run.config))
        if not run.final.is_dir():
            raise ModelError(f"{path}: the run has no final/ folder, so it has not finished. Run ft-dist train again.")
        folder = run.final
    if not (folder / ADAPTER_CONFIG).is_file():
        return Weights(str(folder) if config else resolve_model(path, progress), None, config)
    if config is not None:
        return Weights(str(folder), resolve_model(config.model.path, progress), config)
    return Weights(str(folder), resolve_model(_base_of(folder), progress), None)


def load_finished(path: str, *, device: Any = None, progress: Progress = print) -> Finished:
    """Load for inference: in the dtype of the run, otherwise bf16 on a GPU and fp32 on a CPU.

    Raises ModelError.
    """
    import torch

    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    weights = find_weights(path, progress)
    trained = weights.config.model.dtype if weights.config else None
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}.get(
        trained or ("bf16" if device.type == "cuda" else "fp32")
    )
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

    Raises ModelError if files are missing, damaged or inconsistent.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from ft_dist.model.load import grow_embeddings
    from ft_dist.model.parts.new_tokens import run_token_rows

    source = weights.base or weights.folder
    try:
        with quietly(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # from peft, about tied and resized embeddings, which are handled below
            model = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=dtype,
                trust_remote_code=weights.trust_remote_code,
                # the revision applies to the hub's repository, not to the saved folder
                revision=weights.revision if weights.base else None,
            )
            if weights.base is None:
                return model
            import peft

            grow_embeddings(model, vocabulary)
            adapted = peft.PeftModel.from_pretrained(model, weights.folder, autocast_adapter_dtype=False).to(dtype)
            run_token_rows(adapted)
            return adapted
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise ModelError(f"{weights.folder}: cannot be loaded on {source} ({reason}).") from None


def _base_of(adapter: Path) -> str:
    base = _adapter_config(adapter).get("base_model_name_or_path")
    if not base:
        raise ModelError(f"{adapter / ADAPTER_CONFIG}: has no base_model_name_or_path, so the adapter has no base.")
    return str(base)


def _adapter_config(adapter: Path) -> dict[str, Any]:
    try:
        tree = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{adapter / ADAPTER_CONFIG}: not readable as JSON ({error}).") from None
    if not isinstance(tree, dict):
        raise ModelError(f"{adapter / ADAPTER_CONFIG}: contains {type(tree).__name__}, not a JSON object.")
    return tree
