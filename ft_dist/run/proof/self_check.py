"""Proves before the first step, on the run's own model, ranks and kernels, that what trains is right.

- The objective's loss of a sample equals that of transformers' untouched model.
- It does not depend on other samples in its row, on padding, or on later tokens.
- The base model's weights are finite.
- Gradients can reach every parameter that trains, and training changes nothing else that a commit would have to hold.

Rank 0 measures and the others follow, so that all leave together. A result that lets a run train is cached by what it
depends on: the model's config, weight files and code, the method, kernels, our code and versions.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import TypeAdapter

from ft_dist.config import RunConfig
from ft_dist.data.prepare.preview import first_samples
from ft_dist.data.store.store import SampleStore
from ft_dist.distributed import decided, is_lost_peer
from ft_dist.engine.probe import (
    FAILURES,
    Probe,
    changed_buffers,
    own_losses,
    own_objective,
    own_unreached,
    training_loss,
    unreached,
)
from ft_dist.engine.step import Engine
from ft_dist.errors import ModelError
from ft_dist.model.anatomy.rotary import depends_on_longest
from ft_dist.model.builtin import cache_dir
from ft_dist.observe.files import write_json
from ft_dist.outside import parse_object
from ft_dist.resources import is_out_of_memory
from ft_dist.run.out_of_memory import explain_out_of_memory
from ft_dist.run.proof.cache_key import cache_key
from ft_dist.run.proof.finite import check_finite

TOKENS = (43, 37)
"""Longer samples are cut to these lengths: primes, so that padding and windows do not end with a sample"""
CANDIDATES = 64
ROUNDINGS = {torch.bfloat16: 8.0, torch.float32: 64.0}
"""How many times the effect of one rounding of the embeddings two ways to compute the same loss may differ. Matrix
products sum in fp32, so in that dtype the order of their sums adds to it"""
EXACT = 1 / 8
"""The part of that by which equal shapes may differ"""

Separation = Literal["segments", "positions", "masks", "rows"]
"""What keeps the samples of a row apart: attention by segment, the model's own mask from restarting positions, masks
that we build; or nothing does, and every sample needs a row of its own"""


@dataclass(frozen=True)
class Measured:
    """Losses in nats per labelled token, and how far a loss changes by what it must not depend on."""

    loss: float
    own_loss: float
    tolerance: float
    separation: Separation
    leak: float
    """With `separation`: by other samples or padding"""
    leak_packed: float
    """In packed rows, by the best means there is"""
    foresight: float
    """By a later token of the sample itself"""
    unreached: tuple[str, ...]
    """Trainable parameters that transformers' own forward reaches and ours does not"""
    idle: tuple[str, ...]
    """Trainable parameters that neither reaches"""
    own_extra: float
    """What the model's own loss adds to the cross-entropy; 0 if it computes none"""
    changed_buffers: tuple[str, ...]
    """Buffers that a forward in training changes"""


@dataclass(frozen=True)
class Checked:
    """The result for a run: lines to print, and whether samples may share a row."""

    lines: list[str]
    packs: bool


def self_check(
    engine: Engine, config: RunConfig, *, folder: str, tokenizer: Any, samples: SampleStore | None
) -> Checked:
    """All ranks call it once the engine is built. Raises ModelError on every rank, naming the part that is wrong."""
    _check_trained(engine, config)
    check_finite(engine, config, folder=folder)
    measured, file = _agreed(
        engine,
        config,
        file=lambda: cache_dir() / "self_check" / f"{cache_key(engine, config, folder)}.json",
        probes=lambda: _probes(config, tokenizer, samples),
    )
    engine.objective.by_block_masks = measured.separation == "masks"
    engine.samples_alone = depends_on_longest(engine.objective.causal_lm, config.data.max_length)
    checked = _judge(measured, engine, config, cached=file is None)
    if engine.world.is_main and file is not None:  # only now: a refusal must not outlive its cause
        with contextlib.suppress(OSError):  # a cache that cannot be written costs the next start some seconds
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, asdict(measured))
    return checked


def _check_trained(engine: Engine, config: RunConfig) -> None:
    """What has a gradient is what the method trains. Raises ModelError."""
    frozen: list[str] = []
    trained: list[str] = []
    never = {id(parameter) for parameter in engine.never_trained}
    for name, parameter in engine.objective.model.named_parameters():
        said = config.method.trains(name) and id(parameter) not in never
        if parameter.is_floating_point() and parameter.requires_grad != said:
            (trained if parameter.requires_grad else frozen).append(name)
    for names, state in ((frozen, "frozen, although"), (trained, "trained, although not")):
        if names:
            raise ModelError(
                f"model.path={config.model.path}: self-check: {_some(names)}: {state} method.kind={config.method.kind} "
                "trains it. Report this."
            )


def _judge(measured: Measured, engine: Engine, config: RunConfig, *, cached: bool) -> Checked:
    model = f"model.path={config.model.path}"
    fix = "Set model.kernels=off and report this." if engine.fused.swapped else "This architecture cannot be trained."
    if measured.foresight > measured.tolerance:
        raise ModelError(
            f"{model}: self-check: a later token changes the loss of earlier ones by {measured.foresight:.1g}, so "
            "attention is not causal. Use a causal language model; for BERT and its kin set is_decoder in config.json."
        )
    if not abs(measured.loss - measured.own_loss) <= measured.tolerance:
        raise ModelError(
            f"{model}: self-check: the loss is {measured.loss:.5f} in training, but {measured.own_loss:.5f} by "
            f"transformers' own forward of the same tokens; rounding explains {measured.tolerance:.1g}. {fix}"
        )
    if measured.unreached:
        raise ModelError(
            f"{model}: self-check: no gradient reaches {_some(measured.unreached)}, which the model's own forward does "
            f"reach. {fix}"
        )
    if measured.changed_buffers:
        raise ModelError(
            f"{model}: self-check: training changes {_some(measured.changed_buffers)}, which no optimizer updates and "
            "no commit holds. This architecture cannot be trained here."
        )
    lines = []
    reason = _why_rows(measured, engine, config)
    if config.data.packs and reason:
        if config.data.packing is True:
            raise ModelError(f"{model}: data.packing=true, but {reason}. Set data.packing=auto or false.")
        lines.append(f"{reason}; each sample gets its own row")
    if measured.leak > measured.tolerance:
        raise ModelError(
            f"{model}: self-check: padding or other rows change a sample's loss by {measured.leak:.1g}; rounding "
            f"explains {measured.tolerance:.1g}. {fix}"
        )
    if measured.idle:
        lines.append(f"the model's forward does not use {_some(measured.idle)}; they get no gradient")
    if abs(measured.own_extra) > measured.tolerance:
        lines.append(
            f"the model's own loss adds {measured.own_extra:.2g} to the cross-entropy, such as an auxiliary loss of "
            "routers; training leaves it out"
        )
    loss, own = f"{measured.loss:.5f}", f"{measured.own_loss:.5f}"
    counts = f"{_count(engine.trainable_parameters)} of {_count(engine.total_parameters)}"
    parameters = f"{counts} parameters train ({engine.parts.line()})"
    lines.append(
        f"self-check{' (cached)' if cached else ''}: loss {loss} {'=' if loss == own else '~'} {own} (model's own; "
        f"rounding explains {measured.tolerance:.0e}), isolated to {measured.leak:.0e}, {parameters}"
    )
    return Checked(lines, config.data.packs and not reason)


def _why_rows(measured: Measured, engine: Engine, config: RunConfig) -> str:
    """Why samples cannot share a row, or "". Raises ModelError if they cannot even share a micro-batch."""
    longest = config.data.max_length
    if engine.samples_alone:
        reason = (
            f"with data.max_length={longest}, rotary angles depend on the longest sample of a micro-batch (LongRoPE)"
        )
        if config.batch.micro_rows > 1:
            raise ModelError(
                f"model.path={config.model.path}: batch.micro_rows={config.batch.micro_rows}, but {reason}. Set "
                "batch.micro_rows=1, or data.max_length to the positions of the original model."
            )
        return reason
    if measured.separation == "rows":
        return f"samples in one row change each other's loss by {measured.leak_packed:.1g} in this architecture"
    return ""


def _measure(engine: Engine, samples: Sequence[Probe]) -> Measured:
    other, sample = samples
    losses = own_losses(engine, sample)
    own = float(losses.sum())
    # of a sum of independent terms
    noise = float((own_losses(engine, sample, noise_seed=0) - losses).norm())
    alone = training_loss(engine, [sample])
    # several roundings of the loss itself, whose terms are fp32
    roundings = ROUNDINGS[engine.objective.causal_lm.dtype]
    tolerance = (roundings * noise + 8 * torch.finfo(torch.float32).eps * abs(own)) / sample.labels
    leaks: dict[Separation, Leak] = {}
    for means in _separations(engine):
        engine.objective.by_block_masks = means == "masks"
        leaks[means] = _leak(engine, sample, other, alone)
        if leaks[means].is_below(tolerance):
            break
    packed = min(leaks, key=lambda means: leaks[means].by_change)
    isolated = leaks[packed].is_below(tolerance)
    separation: Separation = packed if isolated else "rows"
    engine.objective.by_block_masks = separation == "masks"
    missing = unreached(engine, sample)
    idle = set(own_unreached(engine, sample)) if missing else set()
    return Measured(
        loss=alone / sample.labels,
        own_loss=own / sample.labels,
        tolerance=tolerance,
        separation=separation,
        leak=leaks[packed].by_change if isolated else _change(engine, sample, alone, [sample], [other.unlabelled()]),
        leak_packed=max(leaks[packed]),
        # in rows that are isolated, the end of the sample has changed too
        foresight=0.0 if isolated else _change(engine, sample, alone, [sample.with_another_end()]),
        unreached=tuple(name for name in missing if name not in idle),
        idle=tuple(name for name in missing if name in idle),
        own_extra=own_objective(engine, sample, otherwise=own / sample.labels) - own / sample.labels,
        changed_buffers=tuple(changed_buffers(engine, sample)),
    )


class Leak(NamedTuple):
    """Changes of a sample's loss per label."""

    by_change: float
    """Between two packed rows of the same shapes that differ in what the sample must not see"""
    by_packing: float
    """Between packed or padded rows and the sample alone, whose shapes differ, and so does rounding"""

    def is_below(self, tolerance: float) -> bool:
        return self.by_change <= tolerance * EXACT and self.by_packing <= tolerance


def _separations(engine: Engine) -> tuple[Separation, ...]:
    return ("segments",) if engine.objective.by_segment else ("positions", "masks")


def _leak(engine: Engine, sample: Probe, other: Probe, alone: float) -> Leak:
    """What other samples, padding and the sample's own last token do to its loss."""
    other = other.unlabelled().reversed()  # shares no prefix with the sample, which would change the shapes
    try:
        behind = training_loss(engine, [other, sample])
        changed = training_loss(engine, [other.rolled(), sample.with_another_end()])
        padded = training_loss(engine, [sample], [other, other])
    except FAILURES as error:
        if is_out_of_memory(error) or not engine.objective.by_block_masks:
            raise
        return Leak(math.inf, math.inf)  # the model does not take such masks
    return Leak(abs(changed - behind) / sample.labels, max(abs(behind - alone), abs(padded - alone)) / sample.labels)


def _change(engine: Engine, sample: Probe, alone: float, *rows: Sequence[Probe]) -> float:
    """How far the loss per label of `sample` in these rows is from that of the sample alone."""
    return abs(training_loss(engine, *rows) - alone) / sample.labels


def _probes(config: RunConfig, tokenizer: Any, samples: SampleStore | None) -> list[list[int]]:
    """The tokens of one or two short samples of the training data. `samples` is None if they are not prepared."""
    if samples is None:
        first = first_samples(config, tokenizer)
        lengths = np.array([len(tokens) for tokens in first])
    else:
        lengths = samples.lengths_of(np.arange(min(len(samples), CANDIDATES)))
    shortest = np.argsort(np.maximum(lengths, 8), kind="stable")[:2].tolist()
    found = [first[at] if samples is None else samples.gather(np.array([at]))[0] for at in shortest]
    return [tokens[: max(TOKENS)].tolist() for tokens in found]


def _pair(found: list[list[int]]) -> tuple[Probe, Probe]:
    """Two samples: one to stand before, and the one whose loss is compared.

    Nearly all tokens are labelled: more of them reveal more, and which ones a run labels does not matter here.
    """
    other, sample = (_cut(np.array(tokens), at_most) for tokens, at_most in zip(found[::-1] * 2, TOKENS, strict=False))
    return other, sample


def _cut(tokens: np.ndarray, at_most: int) -> Probe:
    """`at_most` tokens and at least 11, all but the last labelled."""
    tokens = np.resize(tokens, max(11, min(len(tokens), at_most)))
    return Probe(tokens.astype(np.int64), np.arange(len(tokens)) < len(tokens) - 1)


def _agreed(
    engine: Engine, config: RunConfig, *, file: Callable[[], Path], probes: Callable[[], list[list[int]]]
) -> tuple[Measured, Path | None]:
    """What rank 0 found in its cache, or measured and where to keep it, on every rank. At stage 3 all must measure.

    Rank 0 alone calls `file` and `probes`: what it cannot read must not leave the others in a forward.
    """
    world, timeout_s = engine.world, config.collective_timeout_s

    def begin() -> dict[str, Any]:
        place = file()
        found = _read(place)
        return {"found": asdict(found)} if found else {"found": None, "file": str(place), "probes": probes()}

    begun = decided(world, "self_check/begun", begin, timeout_s=timeout_s)
    if begun["found"]:
        return _parse(begun["found"]), None

    def measure() -> dict[str, Any]:
        with explain_out_of_memory(config, world, flash=engine.flash):
            return asdict(_named_failure(engine, lambda: _measure(engine, _pair(begun["probes"]))))

    measured = decided(world, "self_check/measured", measure, timeout_s=timeout_s, together=engine.stage == 3)
    return _parse(measured), Path(begun["file"])


def _named_failure(engine: Engine, measure: Callable[[], Measured]) -> Measured:
    try:
        return measure()
    except Exception as error:  # any: Triton's errors have no type in common with those of PyTorch
        if is_out_of_memory(error) or is_lost_peer(error):
            raise
        name = type(engine.objective.causal_lm).__name__
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        of_kernels = engine.fused.swapped and not isinstance(error, FAILURES)
        fix = "Set model.kernels=off and report this." if of_kernels else "This architecture cannot be trained here."
        raise ModelError(
            f"model.path={engine.config.model.path}: self-check: the forward of {name} fails ({reason}). {fix}"
        ) from error


def _read(file: Path) -> Measured | None:
    try:
        return _parse(parse_object(file.read_bytes(), where=file, error=ModelError))
    except (OSError, ModelError, ValueError):  # damaged: it is measured again
        return None


def _parse(tree: dict[str, Any]) -> Measured:
    return TypeAdapter(Measured).validate_python(tree)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.2f} M"
