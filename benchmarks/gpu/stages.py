"""The list of stages, most valuable first: what each runs on a GPU, its dry run on CPU, and its seconds.

The seconds cover everything in the stage's process, including cold imports, initialisation and compilation.
"""

from collections.abc import Sequence
from dataclasses import dataclass

BENCH = "benchmarks.gpu.bench"
SIDE = "benchmarks.training.side"


@dataclass(frozen=True)
class Stage:
    """`python -m COMMAND...` on a GPU, `python -m DRY...` in a dry run, if it has one; `needs` names a package
    that may be missing."""

    name: str
    seconds: float
    about: str
    command: tuple[str, ...]
    dry: tuple[str, ...] | None
    needs: str | None = None


def _bench(model: str, *rest: str, length: int = 4096) -> tuple[str, ...]:
    return (BENCH, model, "--length", str(length), "--rows", "2", "batch.micro_rows=2", "--no-checkpoint", *rest)


def _dry_bench(*rest: str) -> tuple[str, ...]:
    return _bench("tiny", "--steps", "2", *rest, length=64)


def _side(name: str) -> tuple[str, ...]:
    work = "--device cuda --dtype bf16 --model llama3-8b --rows 2 --tokens 4096 --warmup 2 --steps 5"
    return (SIDE, name, *work.split())


def _dry_side(name: str) -> tuple[str, ...]:
    return (SIDE, name, "--model", "tiny", "--rows", "2", "--tokens", "64")


CHATS = ("--lengths", "300")
FP8 = ("model.base_dtype=fp8",)
FULL = ("--method", "full", "engine.activation_checkpointing=true")

STAGES: tuple[Stage, ...] = (
    Stage(
        "ceilings",
        25,
        "versions; copy, bf16 and FP8 products; attention backends at the first use of a shape",
        ("benchmarks.gpu.ceilings",),
        ("benchmarks.gpu.ceilings", "--tiny"),
    ),
    Stage(
        "compile",
        15,
        "every kernel, compiled by several processes into one cache",
        ("benchmarks.gpu.compile",),
        ("benchmarks.gpu.compile", "--tiny"),
    ),
    Stage(
        "step",
        50,
        "LoRA of Llama-3-8B through the product's engine: 5 steps, then a profile of 2 by kernel",
        ("benchmarks.gpu.step", "llama3-8b"),
        ("benchmarks.gpu.step", "tiny", "--length", "64", "--steps", "2"),
    ),
    Stage(
        "parity",
        40,
        "every kernel against fp64, in bf16",
        ("benchmarks.kernels.parity", "--device", "cuda"),
        ("benchmarks.kernels.parity", "--device", "cpu", "--tiny"),
    ),
    Stage("bench", 25, "ft-dist bench, LoRA of Llama-3-8B, full rows", _bench("llama3-8b"), _dry_bench()),
    Stage(
        "bench-chats",
        25,
        "the same with packed chats, 300 tokens in the median",
        _bench("llama3-8b", *CHATS),
        _dry_bench("--lengths", "20"),
    ),
    Stage("bench-fp8", 25, "full rows, FP8 base", _bench("llama3-8b", *FP8), _dry_bench(*FP8)),
    Stage(
        "bench-fp8-chats",
        25,
        "packed chats, FP8 base",
        _bench("llama3-8b", *CHATS, *FP8),
        _dry_bench("--lengths", "20", *FP8),
    ),
    Stage("ours", 18, "our bare step: the reference for the peers", _side("ours"), _dry_side("ours")),
    Stage("hf", 18, "Hugging Face + PEFT", _side("hf"), _dry_side("hf")),
    Stage("liger", 16, "the same with Liger's kernels", _side("liger"), None, needs="liger_kernel"),
    Stage("unsloth", 28, "Unsloth", _side("unsloth"), _dry_side("unsloth"), needs="unsloth"),
    Stage(
        "ops",
        40,
        "each op over its floor: time, share of copy bandwidth or of the products",
        ("benchmarks.kernels", "--device", "cuda", "--quick", "--no-peers"),
        ("benchmarks.kernels", "--device", "cpu", "--tiny", "--no-peers"),
    ),
    Stage(
        "full-3b",
        60,
        "full fine-tuning of Llama-3.2-3B with activation checkpointing",
        _bench("llama3.2-3b", *FULL),
        _dry_bench(*FULL),
    ),
)


def limit_of(seconds: float, *, later: float, left: float) -> float | None:
    """The seconds that a stage may take, or None to skip it.

    `later` is the time promised to the stages after it, `left` the time left of the whole script. A stage may overrun
    by at most its own seconds, and only into time that no other stage is promised. A stage that would get less than
    half its seconds is skipped, so a late script loses its last, least valuable stages.
    """
    spare = min(seconds, max(0.0, left - seconds - later))
    limit = min(left, seconds + spare)
    return limit if limit >= seconds / 2 else None


def table(stages: Sequence[Stage]) -> str:
    lines = [f"{'stage':16}{'seconds':>8}  what"]
    lines += [f"{stage.name:16}{stage.seconds:8.0f}  {stage.about}" for stage in stages]
    return "\n".join([*lines, f"{'all':16}{sum(stage.seconds for stage in stages):8.0f}"])
