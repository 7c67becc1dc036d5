"""TRL's own command, `trl sft`: assistant-only labels by the template's generation marks."""

import json
from pathlib import Path

from benchmarks.peers import hugging_face
from benchmarks.peers.case import Case, Command, Peer

TEMPLATE = Path(__file__).parents[1] / "chatml.jinja"


def command(case: Case, folder: Path, binaries: Path) -> Command:
    data = folder / "data"
    data.mkdir(parents=True)
    (data / "train.jsonl").symlink_to(case.ordered)
    settings = hugging_face.training_arguments(case, folder) | {
        "model_name_or_path": str(case.model),
        "dtype": case.torch_dtype,
        "attn_implementation": "sdpa",
        "dataset_name": str(data),
        "chat_template_path": str(TEMPLATE),
        "assistant_only_loss": True,
        # flattened rows cannot be cut; all samples are shorter than the limit anyway
        "max_length": None if case.packed else case.max_length,
        "train_sampling_strategy": "sequential",
        "eos_token": "<|im_end|>",
        # the same samples in one row without padding; positions keep them apart
        "padding_free": case.packed,
    }
    if case.method == "lora":
        settings |= {"use_peft": True, "lora_r": case.rank, "lora_alpha": case.alpha, "lora_dropout": 0.0}
        settings |= {"lora_target_modules": list(case.targets)}
    (folder / "config.yaml").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    return Command([str(binaries / "trl"), "sft", "--config", str(folder / "config.yaml")])


PEER = Peer(
    name="trl",
    command=command,
    step_of=hugging_face.step_of,
    losses=hugging_face.losses,
    packs=True,
    note="packed: padding_free, the same rows per step",
)
