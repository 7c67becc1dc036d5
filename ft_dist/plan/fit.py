"""The fastest setting that fits, with a reason for each part.

The search covers ZeRO's stage, offload to the host, rows per micro-batch and activation checkpointing. It never changes
what is trained, the rows or the global batch. Sequence parallelism is not covered: the engine has none.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ft_dist.config.schema import RunConfig
from ft_dist.errors import ConfigError
from ft_dist.plan.gpu import Gpu
from ft_dist.plan.job import Job
from ft_dist.plan.memory.total import memory_plan
from ft_dist.plan.speed import step_plan

SLACK = 0.01
"""Settings this close in speed count as equal: then no offload, the lowest stage and the least memory win"""
KEYS = ("engine.zero_stage", "engine.offload", "engine.activation_checkpointing", "batch.micro_rows")


@dataclass(frozen=True)
class Fit:
    """A setting that fits, by key; peak bytes per GPU; tokens per second over all ranks; one reason per key."""

    settings: dict[str, Any]
    peak_bytes: int
    tokens_per_s: float
    reasons: dict[str, str]


@dataclass(frozen=True)
class Place:
    """The device for which settings are tried. `memory` in bytes; without a `chip` (on CPU) less work counts as
    faster."""

    memory: int
    chip: Gpu | None
    network: float | None = None


def settings_of(config: RunConfig) -> dict[str, Any]:
    engine = config.engine
    values = (engine.zero_stage, engine.offload, engine.activation_checkpointing, config.batch.micro_rows)
    return dict(zip(KEYS, values, strict=True))


def with_settings(config: RunConfig, settings: dict[str, Any]) -> RunConfig:
    sections: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=changes) for name, changes in sections.items()}
    )


def fit(job: Job, place: Place) -> Fit | None:
    """The fastest setting that fits `place`, or None."""
    speeds = sorted(((_speed(job, each, place), each) for each in _candidates(job)), key=lambda pair: -pair[0])
    best: tuple[float, dict[str, Any], int] | None = None
    too_much: set[tuple[Any, ...]] = set()
    for speed, settings in speeds:
        if best and speed < best[0] * (1 - SLACK):
            break
        apart = tuple(value for key, value in settings.items() if key != "batch.micro_rows")
        if apart in too_much:
            continue
        peak = _peak(job, settings)
        if peak > place.memory:
            if settings["batch.micro_rows"] == 1:
                too_much.add(apart)
            continue
        if best is None or _plain(settings, peak) < _plain(best[1], best[2]):
            best = (best[0] if best else speed), settings, peak
    if best is None:
        return None
    _, settings, peak = best
    speed = _speed(job, settings, place)
    reasons = {key: _reason(job, settings, key, place, speed, peak) for key in KEYS}
    return Fit(settings, peak, speed, reasons)


def _plain(settings: dict[str, Any], peak: int) -> tuple[bool, int, int]:
    """Sort key among equals: the preferred setting first."""
    return settings["engine.offload"] != "none", settings["engine.zero_stage"], peak


def more_ranks(job: Job, place: Place, *, most: int = 1024) -> tuple[int, Fit] | None:
    """The fewest ranks, doubling each time, on which some setting fits."""
    ranks = job.ranks * 2
    while ranks <= min(most, job.config.batch.global_rows):
        found = fit(replace(job, ranks=ranks), place)
        if found:
            return ranks, found
        ranks *= 2
    return None


def _candidates(job: Job) -> Iterator[dict[str, Any]]:
    config = job.config
    rows_a_rank = -(-config.batch.global_rows // job.ranks)
    rows = sorted({rows for power in range(10) if (rows := 2**power) <= rows_a_rank} | {min(rows_a_rank, 512)})
    hosts = ["none"] if config.optim.kind == "muon" or not job.gpu else ["none", "cpu"]
    for stage in (1, 2) if config.model.base_dtype else (1, 2, 3):
        for offload in hosts:
            for checkpointing in (False, True):
                for micro_rows in rows:
                    yield dict(zip(KEYS, (stage, offload, checkpointing, micro_rows), strict=True))


def _with(job: Job, settings: dict[str, Any]) -> Job:
    return replace(job, config=with_settings(job.config, settings))


def _peak(job: Job, settings: dict[str, Any]) -> int:
    return memory_plan(_with(job, settings)).peak


def _speed(job: Job, settings: dict[str, Any], place: Place) -> float:
    changed = _with(job, settings)
    if place.chip:
        return step_plan(changed, place.chip, network=place.network).tokens_per_s
    return 1 / ((1.3 if changed.checkpointing else 1.0) * (1.1 if changed.stage == 3 else 1.0))


def _reason(job: Job, settings: dict[str, Any], key: str, place: Place, speed: float, peak: int) -> str:
    """The effect of each other value of `key`, with all other keys as chosen."""
    others = []
    for value in dict.fromkeys(each[key] for each in _candidates(job)):
        if value == settings[key]:
            continue
        other = settings | {key: value}
        needs = _peak(job, other)
        if needs > place.memory:
            others.append(f"{_text(value)} needs {needs / 2**30:.1f} GiB")
        else:
            change = _speed(job, other, place) / speed - 1
            faster = (
                f"{abs(change):.0%} {'faster' if change > 0 else 'slower'}" if abs(change) >= 0.005 else "no faster"
            )
            others.append(f"{_text(value)} is {faster} at {needs / 2**30:.1f} GiB")
    own = f"{peak / 2**30:.1f} of {place.memory / 2**30:.1f} GiB"
    if key == "engine.offload" and settings[key] == "cpu":
        own += f", and {memory_plan(_with(job, settings)).host / 2**30:.1f} GiB of host memory per GPU"
    return "; ".join([own, *others[:3]])


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def write_recipe(config: RunConfig, found: Fit, path: Path, *, heading: str) -> None:
    """The user's recipe with the setting found, and a comment with the reason at each key. Raises ConfigError."""
    tree = with_settings(config, found.settings).model_dump(exclude_unset=True, mode="json")
    for key, value in found.settings.items():
        section, name = key.split(".")
        tree.setdefault(section, {})[name] = value
    lines = [f"# {heading}"]
    for section, content in tree.items():
        lines.append("")
        if not isinstance(content, dict):
            lines[-1:] = yaml.safe_dump({section: content}, sort_keys=False).splitlines()
            continue
        lines.append(f"{section}:")
        for name, value in content.items():
            entry = yaml.safe_dump({name: value}, sort_keys=False, width=110).splitlines()
            why = found.reasons.get(f"{section}.{name}")
            if why:
                entry[0] += f"  # {why}"
            lines += [f"  {line}" for line in entry]
    try:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--fit {path}: cannot be written ({error.strerror}).") from None
