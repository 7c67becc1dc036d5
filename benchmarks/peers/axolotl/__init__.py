"""`axolotl train --launcher python`, with the tokenizer's own template."""

import json
from pathlib import Path
from typing import Any

from benchmarks.peers import hugging_face
from benchmarks.peers.case import Case, Command, Peer


def command(case: Case, folder: Path, binaries: Path) -> Command:
    dataset = {
        "path": str(case.ordered),
        "ds_type": "json",
        "type": "chat_template",
        "field_messages": "messages",
        "roles_to_train": ["assistant"],
        "train_on_eos": "turn",
    }
    settings: dict[str, Any] = {
        "base_model": str(case.model),
        "chat_template": "tokenizer_default",
        "datasets": [dataset],
        "dataset_prepared_path": str(folder / "prepared"),
        "val_set_size": 0,
        "sequence_len": case.max_length,
        "sample_packing": False,
        "pad_to_sequence_len": False,
        "shuffle_merged_datasets": False,
        "curriculum_sampling": True,
        "micro_batch_size": case.rows,
        "gradient_accumulation_steps": 1,
        "num_epochs": 1,
        "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "learning_rate": case.learning_rate,
        "weight_decay": 0.0,
        "warmup_steps": 0,
        "max_grad_norm": 1.0,
        "bf16": case.dtype == "bf16",
        "fp16": False,
        "tf32": False,
        "attn_implementation": "sdpa",
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": case.steps,
        "save_only_model": True,
        "seed": case.seed,
        "output_dir": str(folder / "out"),
    }
    if case.packed:
        settings |= {"sample_packing": True, "sequence_len": case.packed_length, "micro_batch_size": 1}
    if case.method == "lora":
        settings |= {"adapter": "lora", "lora_r": case.rank, "lora_alpha": case.alpha, "lora_dropout": 0.0}
        settings |= {"lora_target_modules": list(case.targets)}
        if case.device == "cpu":  # by default it enables kernels that allocate on a GPU
            settings |= {f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o", "embedding")}
    (folder / "config.yaml").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    return Command(
        [str(binaries / "axolotl"), "train", str(folder / "config.yaml"), "--launcher", "python"],
        {"AXOLOTL_DO_NOT_TRACK": "1"},
    )


PEER = Peer(
    name="axolotl",
    command=command,
    step_of=hugging_face.step_of,
    losses=hugging_face.losses,
    packs=True,
    note="packed: sample_packing, rows of several samples",
)
