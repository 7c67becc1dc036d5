"""Whether every weight of a model came from its folder: a weight that did not is random, and would train unnoticed."""

import re
from collections.abc import Sequence
from typing import Any

from ft_dist.errors import ModelError

NAMED = 3
"""How many tensors a message names"""

LEFT_OUT = re.compile(
    r"(^|\.)(mtp|visual|vision\w*|image\w*|audio\w*|speech\w*|multi_modal\w*|multimodal\w*|embed_vision|embed_audio|talker"
    r"|token2wav|code2wav)(\.|$)"
)
"""Parts of a checkpoint that a causal language model of text does not have: prediction of further tokens (`mtp`), and
towers for images and sound"""

LAYER = re.compile(r"model\.layers\.(\d+)(?=\.)")

COMPUTED = re.compile(
    r"(^|\.)(rotary_emb|rotary_embedding|rotary_pos_emb)\.inv_freq$|(^|\.)masked_bias$|(^|\.)attn\.bias$"
)
"""Buffers that old checkpoints hold and models compute"""


def check_loaded(found: dict[str, Any], config: Any, where: str) -> list[str]:
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
    unexpected = sorted(name for name in found["unexpected_keys"] if not COMPUTED.search(name))
    left_out = {name: part for name in unexpected if (part := _part_left_out(name, config.get_text_config()))}
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
