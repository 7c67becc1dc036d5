"""`llamafactory-cli train`: it derives its template from the tokenizer, so labels end where ours end."""

import json
from pathlib import Path

from benchmarks.peers import hugging_face
from benchmarks.peers.case import Case, Command, Peer


def command(case: Case, folder: Path, binaries: Path) -> Command:
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    dataset = {
        "file_name": str(case.ordered),
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": tags | {"system_tag": "system"},
    }
    data = folder / "data"
    data.mkdir(parents=True)
    (data / "dataset_info.json").write_text(json.dumps({"rows": dataset}), encoding="utf-8")
    settings = hugging_face.training_arguments(case, folder) | {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": str(case.model),
        "infer_dtype": case.torch_dtype,
        "bf16": case.dtype == "bf16",
        "flash_attn": "sdpa",
        "disable_gradient_checkpointing": True,
        "dataset_dir": str(data),
        "dataset": "rows",
        "cutoff_len": case.max_length,
        "disable_shuffling": True,
        "preprocessing_num_workers": None,
        "finetuning_type": case.method,
    }
    del settings["gradient_checkpointing"]
    if case.packed:
        settings |= {"neat_packing": True, "cutoff_len": case.packed_length, "per_device_train_batch_size": 1}
    if case.method == "lora":
        settings |= {"lora_rank": case.rank, "lora_alpha": case.alpha, "lora_dropout": 0.0}
        settings |= {"lora_target": ",".join(case.targets)}
    (folder / "config.yaml").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    return Command(
        [str(binaries / "llamafactory-cli"), "train", str(folder / "config.yaml")],
        {"DISABLE_VERSION_CHECK": "1"},
    )


PEER = Peer(
    name="llamafactory",
    command=command,
    step_of=hugging_face.step_of,
    losses=hugging_face.losses,
    packs=True,
    note="packed: neat_packing, rows of several samples, block mask",
)
