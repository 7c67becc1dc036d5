"""Faults of what only observes a run: they never stop it, and nothing that is written is wrong."""

import subprocess

from tests.faults.kinds.kind import Kind
from tests.faults.scene import Life, Scene
from tests.faults.shim import Rule


def closed_stdout(scene: Scene) -> Life:
    """As in `ft-dist train ... | head -1`."""
    life = scene.start()
    assert life.process.stdout
    life.process.stdout.readline()
    life.process.stdout.close()
    life.process.stdout = None
    return scene.end(life)


def no_stdout(scene: Scene) -> Life:
    scene.prefix = ["/bin/sh", "-c", 'exec "$@" >&-', "sh"]
    return scene.play()


def closed_stderr(scene: Scene) -> Life:
    life = scene.start(stderr=subprocess.PIPE)
    assert life.process.stderr
    life.process.stderr.close()
    life.process.stderr = None
    return scene.end(life)


def observed(name: str, what: str, *rules: Rule, **more: object) -> Kind:
    return Kind(name, what, "training", rules=rules, **more)  # type: ignore[arg-type]


KINDS = [
    observed(
        "metrics-enospc", "disk full for 3 writes to metrics.jsonl", Rule("write", "*/metrics.jsonl", "ENOSPC", 3)
    ),
    observed(
        "metrics-eio-always",
        "no write to metrics.jsonl works",
        Rule("write", "*/metrics.jsonl", "EIO"),
        words="metrics.jsonl",
        may_lack=("metrics.jsonl",),
    ),
    observed("metrics-short", "writes to metrics.jsonl are cut short", Rule("write", "*/metrics.jsonl", "SHORT")),
    observed(
        "events-eio-always",
        "no write to events.jsonl works",
        Rule("write", "*/events.jsonl", "EIO"),
        words="events.jsonl",
        may_lack=("events.jsonl",),
    ),
    observed(
        "samples-edquot-always",
        "no write to samples.jsonl works",
        Rule("write", "*/samples.jsonl", "EDQUOT"),
        words="samples.jsonl",
        may_lack=("samples.jsonl",),
    ),
    observed("log-enospc-always", "no write to the ranks' logs works", Rule("write", "*/logs/*", "ENOSPC"), ranks=2),
    observed(
        "log-open-eio",
        "the ranks' logs cannot be opened",
        Rule("create", "*/logs/rank-0.log", "EIO"),
        words="rank-0.log",
    ),
    observed(
        "report-enospc", "report.json cannot be written", Rule("write", "*/report.json*", "ENOSPC"), words="report.json"
    ),
    observed(
        "tensorboard-enospc",
        "no write to tensorboard/ works",
        Rule("write", "*/tensorboard/*", "ENOSPC"),
        settings=("observe.tensorboard=true",),
        words="tensorboard",
    ),
    Kind(
        "wandb-no-network",
        "wandb has no key and no network",
        "start",
        settings=("observe.wandb=online",),
        words="wandb",
        leaves="wandb",
    ),
    Kind("stdout-closed", "the reader of the output goes away", "training", story=closed_stdout),
    Kind("stdout-none", "there is no standard output", "start", story=no_stdout),
    Kind("stderr-closed", "the reader of the errors goes away", "training", story=closed_stderr),
]
