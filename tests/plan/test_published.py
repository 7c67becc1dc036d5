"""The plan against published figures, all with the same constants in ft_dist/plan/speed.py.

- ZeRO: Rajbhandari et al., arXiv 1910.02054v3, table 1 and figure 1: model states of 7.5 B parameters on 64 GPUs.
- NeMo AutoModel: https://docs.nvidia.com/nemo/automodel/performance/performance-summary.md, LoRA of Llama 3 8B, one
  H100, sequence 4096, micro-batch 2, global batch 32: 12,473 tokens/s. The recipe is
  examples/llm_finetune/llama3_1/llama3_1_8b_peft_benchmark.yaml of NVIDIA-NeMo/Automodel: rank 16 on all linear
  layers, Triton kernels for LoRA, no activation checkpointing.
- torchtitan: benchmarks/llama3_h100_202412_torchtitan.md of pytorch/torchtitan, tables 1 and 3, Llama 3.1 8B, FSDP,
  sequence 8192, local batch 2, selective checkpointing that recomputes every second matrix product. Its H100s have
  2.4 TB/s of HBM2e and 500 W: "the actual peak TFLOPs number is between SXM and NVL" (989 and 835); the middle
  is used here. A100: docs/performance.md of torchtitan as of 2024 (commit history), 64 A100, local batch 1.
"""

from dataclasses import replace

import pytest

from ft_dist.config import load_config
from ft_dist.plan.gpu import Gpu, gpu_named
from ft_dist.plan.job import Job
from ft_dist.plan.memory.activations import GRADIENTS
from ft_dist.plan.memory.ledger import Ledger
from ft_dist.plan.memory.states import MASTER, MOMENTS, SUMS, WEIGHTS, States
from ft_dist.plan.speed import step_plan
from tests.plan.shapes import LLAMA_8B, LLAMA_70B, shape

# 7.5 B parameters; the table depends on no other part of the shape
SEVEN_AND_A_HALF_B = LLAMA_8B | {"hidden_size": 4096, "intermediate_size": 13040, "num_hidden_layers": 32}


def job(config: dict, ranks: int, *overrides: str) -> Job:
    settings = ["model.dtype=bf16", "data.packing=false", *overrides]
    return Job(shape(config), load_config("smoke", settings), ranks, 8, gpu=True, flash=True)


@pytest.mark.parametrize("stage, ranks, published_gb", [(0, 1, 120.0), (1, 64, 31.4), (2, 64, 16.6), (3, 64, 1.9)])
def test_memory_of_the_zero_paper(stage, ranks, published_gb):
    """The paper keeps gradients in 16 bits; this engine sums them in fp32, so half of their bytes are left out here."""
    planned = job(SEVEN_AND_A_HALF_B, ranks, "method.kind=full", f"engine.zero_stage={stage}")
    assert planned.total == pytest.approx(7.5e9, rel=0.01)
    ledger = Ledger()
    states = States(planned, ledger)
    for parameter in planned.trained:
        states(parameter.numel)
    states.micro_batch_ends(last=False)
    parts = ledger.parts
    held = parts[WEIGHTS] + parts[MASTER] + parts[MOMENTS] + parts[GRADIENTS]
    held += parts[SUMS] / 2
    assert held / 1e9 == pytest.approx(published_gb, rel=0.10)


def capped_h100() -> Gpu:
    h100 = gpu_named("h100")
    share = (989 + 835) / 2 / 989
    return replace(
        h100,
        bandwidth=2.4e12,
        flops=h100.flops * share,
        matmul=h100.matmul * share,
        attention=h100.attention * share,
    )


FSDP = ["method.kind=full", "engine.zero_stage=3", "data.max_length=8192"]
ROWS = {
    "NeMo, LoRA 8B, 1 H100": (
        12_473,
        gpu_named("h100"),
        job(LLAMA_8B, 1, "batch.global_rows=32", "batch.micro_rows=2", "data.max_length=4096", "method.rank=16"),
        None,
    ),
    "torchtitan, 8B, 8 H100, compiled": (
        6_667,
        capped_h100(),
        job(LLAMA_8B, 8, *FSDP, "batch.global_rows=16", "batch.micro_rows=2"),
        0.5,
    ),
    "torchtitan, 8B, 8 H100, not compiled": (
        5_762,
        capped_h100(),
        job(LLAMA_8B, 8, *FSDP, "batch.global_rows=16", "batch.micro_rows=2", "model.kernels=off"),
        0.5,
    ),
    "torchtitan, 8B, 64 A100": (
        2_973,
        gpu_named("a100-80"),
        job(LLAMA_8B, 64, *FSDP, "batch.global_rows=64"),
        0.5,
    ),
    "torchtitan, 70B, 64 A100": (
        331,
        gpu_named("a100-80"),
        job(LLAMA_70B, 64, *FSDP, "batch.global_rows=64", "engine.activation_checkpointing=true"),
        None,
    ),
}


@pytest.mark.parametrize("row", ROWS)
def test_published_tokens_per_second(row):
    published, gpu, planned, recomputed = ROWS[row]
    step = step_plan(planned, gpu, recomputed=recomputed)
    assert step.tokens_per_s_gpu == pytest.approx(published, rel=0.10)


def test_a_row_with_a_larger_error():
    """128 H100 of torchtitan's table 3: 6,514. The plan hides all communication, which is a few percent too good."""
    planned = job(LLAMA_8B, 128, *FSDP, "batch.global_rows=256", "batch.micro_rows=2")
    assert step_plan(planned, capped_h100(), recomputed=0.5).tokens_per_s_gpu == pytest.approx(6_514, rel=0.12)
