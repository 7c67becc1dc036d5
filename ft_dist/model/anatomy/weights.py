"""Whether every weight of a model came from its folder: a weight that did not is random, and would train unnoticed."""

import re
import traceback
from collections.abc import Sequence
from typing import Any

from ft_dist.errors import ModelError
from ft_dist.resources import is_out_of_memory

NAMED = 3
"""How many tensors a message names"""

LEFT_OUT = re.compile(
    r"(^|\.)(mtp|visual|vision\w*|image\w*|audio\w*|speech\w*|multi_modal\w*|multimodal\w*|embed_vision|embed_audio|talker"
    r"|token2wav|code2wav)(\.|$)"
)
"""Parts of a checkpoint that a causal language model of text does not have: prediction of further tokens (`mtp`), and
towers for images and sound"""

LAYER = re.compile(r"model\.layers\.(\d+)(?=\.)")

DROPPED = re.compile(r"(^|\.)(inv_freq|masked_bias|causal_mask|position_ids)$")
"""Buffers of old checkpoints that newer models do not even have"""

MASK = re.compile(r"((^|.*\.)(attn|attention))\.bias$")
"""A causal mask in old checkpoints"""


def is_of_folder(error: Exception, *, alone: bool) -> bool:
    """Whether an error of a load is about the model's folder, and not about memory or other ranks. `alone`: the load
    waits for no other rank and no GPU."""
    logs = _failed_conversions(error)
    if is_out_of_memory(error) or any(is_out_of_memory(RuntimeError(log)) for log in logs.values()):
        return False
    if alone or logs or not isinstance(error, RuntimeError):
        return True
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).startswith("transformers.")


def reason_of(error: Exception) -> str:
    """Why transformers cannot load a model, in one line."""
    for name, log in sorted(_failed_conversions(error).items()):
        raised = re.findall(r"^[\w.]*(?:Error|Exception): (.+)", log, re.MULTILINE) or log.strip().splitlines()[-1:]
        return f"the tensors in the folder do not make up {name}: {raised[0].rstrip('.')}"
    if "trust_remote_code" in str(error):
        return (
            "it needs Python code from there: if you trust that code, set model.trust_remote_code=true in a run, or "
            "pass --trust-remote-code to a command"
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    reason = (" ".join(lines[:2]) if lines[0].endswith(":") else lines[0]).rstrip(".")
    # the text of these errors is a bare name or value
    return f"{type(error).__name__}: {reason}" if isinstance(error, LookupError | ArithmeticError) else reason


def _failed_conversions(error: Exception) -> dict[str, str]:
    """A traceback for each tensor that could not be made from those in the folder; the error names none of them, only a
    report that was logged."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        failed: dict[str, str] = getattr(frame.f_locals.get("loading_info"), "conversion_errors", None) or {}
        if failed:
            return failed
    return {}


def check_loaded(found: dict[str, Any], causal_lm: Any, where: str) -> list[str]:
    """Check what transformers reports of a load (`output_loading_info`); returns a line on the parts left out.

    Raises ModelError, after `where`, naming tensors that are missing, have other shapes, or belong to nothing in the
    model.
    """
    mismatched = sorted(found["mismatched_keys"])
    if mismatched:
        name, stored, expected = mismatched[0]
        raise ModelError(
            f"{where}: {name} has shape {list(stored)}, but config.json makes it {list(expected)}"
            f"{_more(len(mismatched))}. The weights belong to another config.json."
        )
    missing = sorted(found["missing_keys"])
    config = causal_lm.config.get_text_config()
    unexpected = sorted(found["unexpected_keys"] - _computed(found["unexpected_keys"], causal_lm))
    left_out = {name: part for name in unexpected if (part := _part_left_out(name, config))}
    unexpected = [name for name in unexpected if name not in left_out]
    if missing:
        hint = f" It has {_names(unexpected)}, which no layer reads: other names?" if unexpected else ""
        raise ModelError(
            f"{where}: has no weights for {_names(missing)}; they would start random.{hint} Download the "
            "model again, or convert it to the names that transformers saves."
        )
    if unexpected:
        raise ModelError(
            f"{where}: no layer reads {_names(unexpected)}. Its config.json describes another model; use the "
            "one that these weights were saved with."
        )
    errors = found.get("error_msgs") or []
    if errors:
        raise ModelError(f"{where}: {str(errors[0]).strip().splitlines()[0]}")
    if not left_out:
        return []
    parts = ", ".join(sorted(set(left_out.values())))
    return [f"model: {parts} ({len(left_out)} tensors) are left out of training and of final/"]


def _computed(names: set[str], causal_lm: Any) -> set[str]:
    """Those of `names` that are buffers, which the model computes."""
    buffers = {name for name, _ in causal_lm.named_buffers()}
    weights = names | {name for name, _ in causal_lm.named_parameters()}
    masks = {name for name in names if (found := MASK.search(name)) and f"{found[1]}.weight" not in weights}
    return {name for name in names if name in buffers | masks or DROPPED.search(name)}


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + _more(len(names) - NAMED + 1)


def _more(count: int) -> str:
    return f" and {count - 1} more" if count > 1 else ""


def _part_left_out(name: str, config: Any) -> str | None:
    """The part of the checkpoint that holds the tensor, if a causal language model has no such part."""
    match = LEFT_OUT.search(name)
    if match:
        return name[: match.end(2)]
    found = LAYER.match(name)
    if found and getattr(config, "num_nextn_predict_layers", None) and int(found[1]) >= config.num_hidden_layers:
        return found[0]
    return None
