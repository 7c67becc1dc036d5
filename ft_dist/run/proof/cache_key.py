"""What the result of a self-check depends on."""

import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

import torch

from ft_dist.checkpoint.identity import weight_files
from ft_dist.config import RunConfig
from ft_dist.engine.step import Engine
from ft_dist.preflight.same import code_hash
from ft_dist.resources import versions


def cache_key(engine: Engine, config: RunConfig, folder: str) -> str:
    """A digest of model, weights, method, kernels, code and versions; `folder` holds the base model."""
    device = engine.world.device
    causal_lm = engine.objective.causal_lm
    model = causal_lm.config
    parts = [
        model.to_json_string(use_diff=False),
        [
            getattr(model, "_commit_hash", None),
            model._attn_implementation,
            model.get_text_config()._attn_implementation,
        ],
        # of a hub id there are none: its commit says the same
        [(path.name, size, changed) for path, size, changed in weight_files(Path(folder))],
        _remote_code(causal_lm),
        config.method.model_dump(),
        config.model.model_dump(exclude={"path", "revision", "chat_template"}),
        {
            "fused": engine.fused.line(),
            "stage 3": engine.stage == 3,
            "checkpointing": config.engine.activation_checkpointing,
        },
        torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        [name for name, _ in engine.trainable()],
        versions(),
        code_hash(),
    ]
    return hashlib.blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def _remote_code(causal_lm: Any) -> list[str]:
    """The code that came with the model, from a folder or the hub, as transformers runs it."""
    kinds = [kind for kind in (type(causal_lm), type(causal_lm.config)) if "transformers_modules" in kind.__module__]
    folders = {Path(inspect.getfile(kind)).parent for kind in kinds}
    return [path.read_text(encoding="utf-8") for place in sorted(folders) for path in sorted(place.rglob("*.py"))]
