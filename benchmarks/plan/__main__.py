"""`python -m benchmarks.plan`: planned tokens/s up to 1,024 GPUs, as docs/plan-scaling.svg. Needs no GPU.

LoRA and full fine-tuning of the shapes of Llama 3 8B and 70B, ZeRO 2, 3 and ++, on two interconnects. It is the plan's
arithmetic (ft_dist/plan/speed.py), not a measurement; docs/how-to/plan.md lists what it assumes.
"""

import argparse
import sys
from functools import cache
from pathlib import Path
from typing import Any

from ft_dist.config.schema import RunConfig
from ft_dist.model.shape import ModelShape, shape_of_config
from ft_dist.plan.gpu import gpu_named
from ft_dist.plan.job import Job
from ft_dist.plan.memory.total import memory_plan
from ft_dist.plan.speed import step_plan

GPUS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
NETWORKS = {"400 Gb/s a GPU": 50e9, "25 Gb/s a GPU": 3.125e9}
STAGES = {"ZeRO 2": (2, False), "ZeRO 3": (3, False), "ZeRO++": (3, True)}
COLOURS = {"ZeRO 2": "#0072B2", "ZeRO 3": "#E69F00", "ZeRO++": "#009E73"}
# hidden, intermediate, layers, heads, kv heads, vocabulary: the models' own config.json
SHAPES = {"8B": (4096, 14336, 32, 32, 8, 128256), "70B": (8192, 28672, 80, 64, 8, 128256)}
CHIP, LENGTH = "h100", 4096


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan")
    parser.add_argument("--svg", default=str(Path(__file__).resolve().parents[2] / "docs" / "plan-scaling.svg"))
    options = parser.parse_args()
    Path(options.svg).write_text(plot(), encoding="utf-8")
    print(f"written to {options.svg}")
    return 0


def shape(name: str) -> ModelShape:
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    config: dict[str, Any] = dict(zip((*keys, "vocab_size"), SHAPES[name], strict=True))
    return shape_of_config(config | {"model_type": "llama", "tie_word_embeddings": False}, name)


@cache
def job(model: str, method: str, stage: int, ranks: int) -> tuple[Job, int]:
    """One row of LENGTH tokens per GPU, two micro-batches per step; and the peak bytes of a GPU."""
    tree: dict[str, Any] = {
        "model": {"path": model},
        "method": {"kind": method},
        "data": {"train": ["none"], "max_length": LENGTH, "packing": False},
        "batch": {"global_rows": 2 * ranks, "micro_rows": 1},
        "engine": {"zero_stage": stage, "activation_checkpointing": True},
        "output_dir": "none",
    }
    found = Job(shape(model), RunConfig.model_validate(tree), ranks, min(8, ranks), gpu=True, flash=True)
    return found, memory_plan(found).peak


def efficiency(model: str, method: str, stage: int, plusplus: bool, network: float) -> list[tuple[int, float]]:
    """(GPUs, tokens/s per GPU) where it fits."""
    chip = gpu_named(CHIP)
    jobs = [(ranks, *job(model, method, stage, ranks)) for ranks in GPUS]
    return [
        (ranks, step_plan(each, chip, network=network, zeropp=plusplus).tokens_per_s_gpu)
        for ranks, each, peak in jobs
        if peak <= chip.memory
    ]


def plot() -> str:
    panels = []
    for row, (model, method) in enumerate([("8B", "lora"), ("8B", "full"), ("70B", "lora"), ("70B", "full")]):
        settings = [(stage, plus, network) for network in NETWORKS.values() for stage, plus in STAGES.values()]
        top = max(rate for each in settings for _, rate in efficiency(model, method, *each))
        for column, (name, network) in enumerate(NETWORKS.items()):
            x, y = 60 + 440 * column, 40 + 220 * row
            panels.append(panel(x, y, f"{model} {method}, {name}", model, method, network, top))
    legend = "".join(
        f'<rect x="{60 + 120 * index}" y="918" width="24" height="4" fill="{COLOURS[name]}"/>'
        f'<text x="{90 + 120 * index}" y="924">{name}</text>'
        for index, name in enumerate(STAGES)
    )
    title = f"Planned tokens/s a GPU, {gpu_named(CHIP).name}, rows of {LENGTH} tokens, checkpointing"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 920 940" font-family="sans-serif" font-size="12">'
        f'<rect width="920" height="940" fill="#fff"/><text x="60" y="20" font-size="15">{title}</text>'
        f"{''.join(panels)}{legend}</svg>\n"
    )


def panel(x: int, y: int, title: str, model: str, method: str, network: float, top: float) -> str:
    width, height = 380, 150
    drawn = [
        f'<text x="{x}" y="{y}">{title}</text>',
        f'<path d="M{x} {y + 10}V{y + 10 + height}H{x + width}" fill="none" stroke="#444"/>',
        f'<text x="{x - 4}" y="{y + 18}" text-anchor="end">{top:,.0f}</text>',
        f'<text x="{x - 4}" y="{y + 10 + height}" text-anchor="end">0</text>',
    ]
    across = width / (len(GPUS) - 1)
    for index, ranks in enumerate(GPUS):
        place = f'x="{x + index * across:.0f}" y="{y + height + 26}" text-anchor="middle"'
        drawn.append(f"<text {place}>{ranks}</text>")
    for name, (stage, plusplus) in STAGES.items():
        points = [
            f"{x + GPUS.index(ranks) * across:.1f} {y + 10 + height * (1 - rate / top):.1f}"
            for ranks, rate in efficiency(model, method, stage, plusplus, network)
        ]
        if points:
            drawn.append(f'<path d="M{"L".join(points)}" fill="none" stroke="{COLOURS[name]}" stroke-width="2"/>')
        else:
            drawn.append(f'<text x="{x + 10}" y="{y + 40}" fill="{COLOURS[name]}">{name} does not fit</text>')
    return "".join(drawn)


if __name__ == "__main__":
    sys.exit(main())
