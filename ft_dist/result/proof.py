"""Proves a written folder: loaded again with plain transformers (and peft), it holds and computes what it should.

Only few short samples are scored, on the CPU, and only if the model fits in free memory. T: tokens, V: vocabulary.
"""

import contextlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ft_dist.config import RunConfig
from ft_dist.data.stream.batch import IGNORED, MicroBatch
from ft_dist.engine.digests import Digest, persistent_buffers
from ft_dist.errors import ModelError
from ft_dist.model.load import DTYPES
from ft_dist.model.quiet import quietly
from ft_dist.plan.gpu import free_host_memory
from ft_dist.result.load import Weights, load_weights

SAMPLES = 8
MAX_TOKENS = 4096
"""In all scored samples together"""
MAX_FLOPS = 4e12
"""Of all scored samples together: some seconds to a minute on a CPU"""
MAX_BYTES = 32 << 30
"""Larger models are not loaded again: reading and scoring them would take minutes while all ranks wait"""
SPARE_MEMORY = 1.25
"""Free memory that loading needs, as a multiple of the weights"""
NOISE = {"fp32": 1e-3, "bf16": 3e-2}
"""Differences in loss (relative above 1 nat) that the order of sums explains, by dtype; a lost buffer or layer costs
more"""


class ProofRow(NamedTuple):
    """One sample: ids (T,) int64 and the token that each predicts, IGNORED where it is not labelled (T,) int64."""

    ids: torch.Tensor
    labels: torch.Tensor

    @classmethod
    def of(cls, batch: MicroBatch) -> "ProofRow":
        """From a micro-batch of one sample."""
        return cls(batch.input_ids[0, : batch.real_tokens], batch.labels[0, : batch.real_tokens])


def token_budget(parameters: int) -> int:
    """How many tokens may be scored with a model of that size."""
    return min(MAX_TOKENS, int(MAX_FLOPS / (2 * max(parameters, 1))))


def fits(nbytes: int) -> str | None:
    """Why weights of `nbytes` are not loaded again, or None."""
    if nbytes > MAX_BYTES:
        return f"{nbytes / 2**30:.0f} GiB of weights; up to {MAX_BYTES >> 30} GiB are loaded again"
    free = free_host_memory()
    if free is not None and free < SPARE_MEMORY * nbytes:
        return f"{nbytes / 2**30:.1f} GiB of weights, but {free / 2**30:.1f} GiB of memory are free"
    return None


def loss_of(model: Any, rows: Sequence[ProofRow]) -> float:
    """Mean loss in nats over the labelled tokens, from the model's own forward."""
    loss_sum, labelled = 0.0, 0
    with torch.no_grad(), quietly():
        for row in rows:
            logits_TV = model(input_ids=row.ids[None], use_cache=False).logits[0].float()
            loss_sum += float(F.cross_entropy(logits_TV, row.labels, ignore_index=IGNORED, reduction="sum"))
            labelled += int((row.labels != IGNORED).sum())
    return loss_sum / labelled if labelled else math.nan


def agree(loss: float, other: float, *, dtype: str) -> bool:
    """Whether the losses differ by no more than the noise of `dtype`."""
    return abs(loss - other) <= NOISE[dtype] * max(1.0, abs(loss), abs(other))


def prove_final(
    folder: Path,
    digests: Mapping[str, Digest],
    *,
    config: RunConfig,
    base: str,
    vocabulary: int,
    rows: Sequence[ProofRow],
    trained_loss: float | None,
) -> dict[str, Any]:
    """Load `folder` again, compare every tensor with `digests` and its loss on `rows` with `trained_loss`.

    `base` is the folder of the model that was trained. Returns what was compared: `agrees` is False if the loss differs
    or loading `changed` tensors, and `reason` says why something was not compared. The files themselves are right.
    """
    frozen = config.method.frozen_base
    # the run's own folder, and the config of its caller
    weights = Weights(str(folder), base if frozen else None, config, config.model.trust_remote_code)
    with _all_cores():
        try:
            model = load_weights(weights, dtype=DTYPES[config.model.dtype], vocabulary=vocabulary).eval()
        except (ModelError, MemoryError) as error:
            return {"reloaded": False, "reason": f"it did not load again: {error}"}
        found: dict[str, Any] = {"reloaded": True}
        if changed := _changed(model, digests, partly=frozen):
            found |= {"changed": changed, "agrees": False}
        if trained_loss is None or not rows:
            return found
        try:
            reloaded_loss = loss_of(model, rows)
        except (RuntimeError, ValueError, TypeError) as error:  # a model that runs only on a GPU
            return found | {"reason": f"it was not scored on the CPU: {(str(error).splitlines() or ['?'])[0]}"}
    found |= {"loss": _finite(trained_loss), "reloaded_loss": _finite(reloaded_loss)}
    found |= {"samples": len(rows), "labelled_tokens": sum(int((row.labels != IGNORED).sum()) for row in rows)}
    if config.model.base_dtype is None:
        same = agree(trained_loss, reloaded_loss, dtype=config.model.dtype)
        found["agrees"] = same and found.get("agrees", True)
    return found


def _changed(model: nn.Module, digests: Mapping[str, Digest], *, partly: bool) -> list[str]:
    """Tensors that loading changed, lost or added; `partly`: an adapter, whose base has other tensors too.

    Youtu's class, for example, zeroes the padding token's embedding whenever it loads.
    """
    loaded = dict(model.named_parameters()) | dict(persistent_buffers(model))
    # transformers keeps some tensors in a wider dtype than training did; the files themselves were compared before
    changed = [
        name
        for name, digest in digests.items()
        if name not in loaded or Digest.of(loaded[name].to(digest.dtype)) != digest
    ]
    return changed + ([] if partly else sorted(loaded.keys() - digests.keys()))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@contextlib.contextmanager
def _all_cores() -> Iterator[None]:
    """The other ranks of this machine wait, so use their cores too."""
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
