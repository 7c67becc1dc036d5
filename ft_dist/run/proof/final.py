"""Writes `final/` and proves it: what is written is what was trained."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ft_dist.checkpoint.commit.format import commits
from ft_dist.config import RunConfig
from ft_dist.data.store.store import SampleStore
from ft_dist.data.stream.batch import MicroBatch, collate
from ft_dist.distributed import max_over_ranks
from ft_dist.engine.digests import Digest
from ft_dist.engine.save_pretrained import write_final
from ft_dist.engine.step import Engine
from ft_dist.errors import DataError, StorageError, counted
from ft_dist.result.proof import SAMPLES, ProofRow, fits, prove_final, token_budget
from ft_dist.run_folder import RunFolder

CANDIDATES = 256
"""The shortest of the first samples are scored"""


def write_and_prove(
    engine: Engine, tokenizer: Any, config: RunConfig, *, base: str, step: int, samples: SampleStore | None
) -> tuple[dict[str, Any], list[str]]:
    """Write `final/`; returns what was checked, for the summary, and notes. All ranks call it.

    `base` is the folder of the model that was trained, for `step` steps. A few of `samples` are scored by both models;
    None: only tensors are compared. Raises StorageError or TrainingError.
    """
    frozen = config.method.frozen_base
    width = 2 if config.model.dtype == "bf16" else 4
    pad_id = tokenizer.pad_token_id or 0
    batches: list[MicroBatch] = []
    if engine.world.is_main and samples is not None:
        with suppress(DataError, StorageError, OSError):  # a remote set may be gone by now
            batches = _short_samples(engine, samples, pad_id)
    loss = _trained_loss(engine, samples, batches, pad_id)
    found: dict[str, Any] = {}

    def prove(folder: Path, digests: Mapping[str, Digest], nbytes: int) -> None:
        found.update(tensors=len(digests), bytes=nbytes)
        # asked here, where the copy of the trained weights is in memory too
        skipped = fits(engine.total_parameters * width)
        found.update(
            {"reloaded": False, "reason": skipped}
            if skipped
            else prove_final(
                folder,
                digests,
                config=config,
                base=base,
                vocabulary=len(tokenizer),
                rows=[ProofRow.of(batch) for batch in batches],
                trained_loss=loss if batches else None,
            )
        )

    advice = _advice(config, step) if engine.world.is_main else ""
    notes = write_final(engine, tokenizer, RunFolder(config.run_dir).final, prove=prove, advice=advice)
    return found, notes + (_notes(found, adapter=frozen) if engine.world.is_main else [])


def check_line(found: Mapping[str, Any]) -> str:
    """What was checked, in one line."""
    line = f"final/: {found['tensors']} tensors read back, equal to the trained ones"
    if not found["reloaded"]:
        return f"{line}; not loaded again: {found['reason']}"
    if "loss" not in found:
        return f"{line}; loaded again" + (f", {found['reason']}" if "reason" in found else "")
    return (
        f"{line}; loaded again, loss {_number(found['reloaded_loss'])} on {found['samples']} samples, "
        f"{_number(found['loss'])} in training"
    )


def _notes(found: Mapping[str, Any], *, adapter: bool) -> list[str]:
    if found.get("agrees", True):
        return []
    if changed := found.get("changed"):
        return [
            f"final/ is as trained, but transformers changes {counted(len(changed), 'tensor')} of it while loading: "
            f"{', '.join(changed[:3])}"
        ]
    if found["loss"] is None:
        samples = counted(found["samples"], "sample")
        return [f"the loss of the trained model is not finite on {samples}. final/ holds it as it is; lower optim.lr"]
    what = "its base model is not the one that was trained on" if adapter else "a part of the model is not saved"
    return [
        f"final/ scores {_number(found['reloaded_loss'])} when loaded again, the trained model "
        f"{_number(found['loss'])}, on the same samples: {what}, or transformers computes it differently"
    ]


def _short_samples(engine: Engine, store: SampleStore, pad_id: int) -> list[MicroBatch]:
    """The shortest labelled samples, each a batch, within the budget."""
    ids = np.arange(min(len(store), CANDIDATES))
    lengths = store.lengths_of(ids)
    labelled = store.labelled_of(ids)
    left = token_budget(engine.total_parameters)
    batches: list[MicroBatch] = []
    for sample in ids[np.argsort(lengths, kind="stable")].tolist():
        left -= int(lengths[sample])
        if left < 0 or len(batches) == SAMPLES:
            break
        if labelled[sample]:
            batches.append(_collate(engine, [[sample]], store, pad_id))
    return [batch for batch in batches if batch.groups is None]


def _trained_loss(engine: Engine, store: SampleStore | None, batches: list[MicroBatch], pad_id: int) -> float:
    """Mean loss of rank 0's batches. The other ranks run dummies, because ZeRO-3 gathers weights in each forward."""
    loss_sum, weight = 0.0, 0
    for index in range(int(max_over_ranks(len(batches), engine.world))):
        assert store is not None
        batch = batches[index] if index < len(batches) else _collate(engine, [], store, pad_id)
        loss_sum += float(engine.loss_sum(batch))
        weight += engine.objective.weight(batch)
    return loss_sum / max(weight, 1)


def _collate(engine: Engine, rows: list[list[int]], store: SampleStore, pad_id: int) -> MicroBatch:
    on_gpu = engine.world.device.type == "cuda"
    return collate(rows, store, pad_id=pad_id, gpu_length=engine.config.data.max_length if on_gpu else None)


def _advice(config: RunConfig, step: int) -> str:
    """What is safe, what is not, and how to go on."""
    steps: list[int] = []
    with suppress(StorageError):
        steps = [commit.step for commit in commits(RunFolder(config.run_dir).checkpoints, wait_s=1.0)]
    if not steps:
        return "No commit holds the trained weights either. Fix the cause and run the same command again."
    return (
        f"The commit of step {steps[-1]} is safe: fix the cause and run the same command again, which resumes there "
        "and writes final/."
        + (f" The steps after it, up to {step}, could not be saved and are trained again." if steps[-1] < step else "")
    )


def _number(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"
