"""Shared by the peers built on Hugging Face's Trainer: its log lines and its state file."""

import ast
import json
import re
from pathlib import Path
from typing import Any

from benchmarks.peers.case import Case, Step

_LOG = re.compile(r"\{'loss': .*\}")


def step_of(line: str, seen: int) -> Step | None:
    """`{'loss': '2.31', 'grad_norm': '1.2', ...}` per optimizer step; older releases print numbers, not strings."""
    found = _LOG.search(line)
    if not found:
        return None
    try:
        return Step(seen + 1, float(ast.literal_eval(found.group())["loss"]))
    except (ValueError, SyntaxError):
        return None


def losses(folder: Path) -> dict[int, float]:
    """Losses with all their digits, from the state file in the run's last checkpoint."""
    files = sorted(folder.rglob("trainer_state.json"), key=lambda path: path.stat().st_mtime)
    if not files:
        return {}
    history = json.loads(files[-1].read_text(encoding="utf-8"))["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def training_arguments(case: Case, folder: Path) -> dict[str, Any]:
    """The TrainingArguments of transformers that give the same work."""
    return {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": case.rows,
        "gradient_accumulation_steps": 1,
        "learning_rate": case.learning_rate,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "logging_first_step": True,
        "save_strategy": "steps",
        "save_steps": case.steps,
        "save_only_model": True,
        "report_to": "none",
        "bf16": False,
        "fp16": False,
        "use_cpu": case.device == "cpu",
        "gradient_checkpointing": False,
        "seed": case.seed,
        "dataloader_num_workers": 0,
    }
