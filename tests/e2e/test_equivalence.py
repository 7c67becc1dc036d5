"""Losses and gradient norms equal those of a plain PyTorch loop, for any split of a batch into ranks and micro-batches,
any ZeRO stage, full fine-tuning and LoRA.
"""

from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, SMALL_RUN, read_lines
from tests.e2e.plain_loop import plain_losses

# CI runs each stage, method, world size and micro-batch at least once; `make equivalence` runs all
FEW = [
    ("full", 0, 1, 1),
    ("full", 1, 2, 2),
    ("full", 3, 3, 1),
    ("lora", 0, 2, 1),
    ("lora", 2, 3, 2),
    ("lora", 3, 2, 2),
]
ALL = [(k, s, n, m) for k in ("full", "lora") for s in range(4) for n in (1, 2, 3) for m in (1, 2)]


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """Losses of the plain loop by method, in the sample order that a first run recorded."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}

    def of(kind: str, dtype: str, run: Path) -> list[tuple[float, float]]:
        if (kind, dtype) not in found:
            steps = [[i for row in line["rows"] for i in row] for line in read_lines(run / "samples.jsonl")]
            rates = [line["lr"] for line in read_lines(run / "metrics.jsonl")]
            model, tokenizer = fresh_model(kind, dtype)
            found[kind, dtype] = plain_losses(model, tokenizer, ROOT / "configs/emails/train.jsonl", steps, rates, 1.0)
        return found[kind, dtype]

    return of


def fresh_model(kind: str, dtype: str):
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ft_dist.model.builtin import resolve_model

    folder = resolve_model("tiny-llama")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
    if kind != "full":
        settings = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
        model = peft.get_peft_model(model, settings, autocast_adapter_dtype=False)
    return model, AutoTokenizer.from_pretrained(folder)


def check_run(cli, plain, folder, kind, stage, nproc, micro_rows, *, dtype="fp32", tolerance=1e-5):
    done = cli(
        "train",
        *SMALL_RUN,
        f"model.dtype={dtype}",
        f"method.kind={kind}",
        f"engine.zero_stage={stage}",
        f"batch.micro_rows={micro_rows}",
        f"output_dir={folder}",
        "--nproc",
        str(nproc),
    )
    assert done.returncode == 0, done.stderr
    ours = [(line["loss"], line["grad_norm"]) for line in read_lines(folder / "metrics.jsonl")]
    truth = plain(kind, dtype, folder)
    assert len(ours) == len(truth) == 10
    for step, (mine, reference) in enumerate(zip(ours, truth, strict=True), 1):
        assert mine == pytest.approx(reference, rel=tolerance), f"step {step}"


@pytest.mark.parametrize("kind, stage, nproc, micro_rows", FEW)
def test_steps_equal_plain_pytorch(cli, plain, tmp_path, kind, stage, nproc, micro_rows):
    check_run(cli, plain, tmp_path / "run", kind, stage, nproc, micro_rows)


@pytest.mark.slow
@pytest.mark.parametrize("kind, stage, nproc, micro_rows", [case for case in ALL if case not in FEW])
def test_every_split_equals_plain_pytorch(cli, plain, tmp_path, kind, stage, nproc, micro_rows):
    check_run(cli, plain, tmp_path / "run", kind, stage, nproc, micro_rows)


@pytest.mark.parametrize("kind, stage, nproc", [("full", 0, 2), ("lora", 1, 1), ("lora", 3, 2)])
def test_bf16_stays_close(cli, plain, tmp_path, kind, stage, nproc):
    check_run(cli, plain, tmp_path / "run", kind, stage, nproc, 1, dtype="bf16", tolerance=2e-2)
