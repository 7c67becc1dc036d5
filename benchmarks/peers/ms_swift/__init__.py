"""`swift sft` with a template registered by `plugin.py`: its own ChatML trains on the line break after a turn."""

from pathlib import Path

from benchmarks.peers import hugging_face
from benchmarks.peers.case import Case, Command, Peer

PLUGIN = Path(__file__).with_name("plugin.py")


def command(case: Case, folder: Path, binaries: Path) -> Command:
    settings = hugging_face.training_arguments(case, folder) | {
        "model": str(case.model),
        "model_type": "llama",
        "template": "benchmark",
        "external_plugins": str(PLUGIN),
        "dataset": str(case.ordered),
        "torch_dtype": case.torch_dtype,
        "bf16": case.dtype == "bf16",
        "attn_impl": "sdpa",
        "max_length": case.max_length,
        "tuner_type": case.method,
        "dataset_shuffle": False,
        "train_dataloader_shuffle": False,
        "split_dataset_ratio": 0,
        "add_version": False,
    }
    if case.method == "lora":
        settings |= {"lora_rank": case.rank, "lora_alpha": case.alpha, "lora_dropout": 0.0}
    arguments = [
        f"--{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in settings.items()
    ]
    if case.method == "lora":
        arguments += ["--target_modules", *case.targets]
    return Command([str(binaries / "swift"), "sft", *arguments])


PEER = Peer(
    name="ms-swift",
    command=command,
    step_of=hugging_face.step_of,
    losses=hugging_face.losses,
    note="packing and padding_free need flash attention, which needs a GPU",
)
