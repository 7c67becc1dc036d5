"""`litgpt finetune_lora` and `finetune_full`, on a checkpoint converted once; its loader shuffles with a known seed."""

import csv
import json
import subprocess
from pathlib import Path

from benchmarks.peers.case import TARGETS, Case, Command, Peer, Step

NAMES = {"smollm2-135m": "SmolLM2-135M-Instruct"}
"""LitGPT looks up a model's shape by the name of its folder"""

DATA_SEED = 42


def command(case: Case, folder: Path, binaries: Path) -> Command:
    data = folder / "data"
    data.mkdir(parents=True)
    rows = [json.loads(line)["messages"] for line in case.ordered.read_text(encoding="utf-8").splitlines()]
    samples = [sample(turns) for turns in rows]
    (data / "train.json").write_text(json.dumps(samples, ensure_ascii=False), encoding="utf-8")
    (data / "val.json").write_text(json.dumps(samples[:1], ensure_ascii=False), encoding="utf-8")
    optimizer = {
        "class_path": "torch.optim.AdamW",
        "init_args": {"lr": case.learning_rate, "weight_decay": 0.0, "betas": [0.9, 0.999], "eps": 1e-8},
    }
    arguments = {
        "data": "JSON",
        "data.json_path": str(data),
        "data.mask_prompt": "true",
        "data.prompt_style": "smollm2",
        "data.num_workers": 0,
        "data.seed": DATA_SEED,
        "precision": {"fp32": "32-true", "bf16": "bf16-true"}[case.dtype],
        "train.global_batch_size": case.rows,
        "train.micro_batch_size": case.rows,
        "train.max_seq_length": case.max_length,
        # LitGPT divides by it; the learning rate of the first step is 0
        "train.lr_warmup_steps": 1,
        "train.epochs": 1,
        "eval.final_validation": "false",
        "eval.max_iters": 1,
        "eval.interval": 10**9,
        "eval.max_new_tokens": 1,
        "out_dir": str(folder / "out"),
        "optimizer": json.dumps(optimizer),
        "seed": case.seed,
    }
    if case.method == "lora":
        arguments |= {"lora_r": case.rank, "lora_alpha": case.alpha, "lora_dropout": 0.0} | adapters(case.targets)
    verb = {"lora": "finetune_lora", "full": "finetune_full"}[case.method]
    flags = [text for key, value in arguments.items() for text in (f"--{key}", str(value))]
    return Command([str(binaries / "litgpt"), verb, str(converted(case, binaries)), *flags])


def sample(turns: list[dict[str, str]]) -> dict[str, str]:
    """In the form of its ChatML style. Raises LookupError for a chat with more than one question and answer."""
    if [turn["role"] for turn in turns] != ["system", "user", "assistant"]:
        raise LookupError("LitGPT takes one system prompt, one question and one answer per row")
    system, question, answer = (turn["content"] for turn in turns)
    return {"sys_prompt": system, "instruction": question, "output": answer}


def adapters(targets: tuple[str, ...]) -> dict[str, str]:
    """Its switches select groups of layers."""
    wanted = set(targets)
    groups = {"query": {"q_proj"}, "key": {"k_proj"}, "value": {"v_proj"}, "projection": {"o_proj"}}
    groups["mlp"] = set(TARGETS[4:])
    return {f"lora_{name}": str(layers <= wanted).lower() for name, layers in groups.items()}


def converted(case: Case, binaries: Path) -> Path:
    """The checkpoint in LitGPT's form, made before the clock starts and kept next to the original."""
    name = next((name for known, name in NAMES.items() if case.model.name.startswith(known)), None)
    if name is None:
        raise LookupError(f"LitGPT is set up here for {', '.join(NAMES)} only, not {case.model.name}")
    folder = case.model.with_name(f"{case.model.name}-litgpt") / name
    if not (folder / "lit_model.pth").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        for file in case.model.iterdir():
            if not (folder / file.name).exists():
                (folder / file.name).symlink_to(file)
        convert = [str(binaries / "litgpt"), "convert_to_litgpt", str(folder)]
        subprocess.run(convert, check=True, capture_output=True, text=True, timeout=600)
    return folder


def order(rows: int, seed: int) -> list[int]:
    """Its DataLoader's order: a generator with the same seed gives the same permutation."""
    import torch
    from torch.utils.data import DataLoader

    places = list(range(rows))
    loader = DataLoader(places, shuffle=True, batch_size=None, generator=torch.Generator().manual_seed(DATA_SEED))  # type: ignore[arg-type]
    return [int(place) for place in loader]


def step_of(line: str, seen: int) -> Step | None:
    """`Epoch 1 | iter 3 step 3 | loss train: 2.345, val: n/a | iter time: 812.20 ms (step)`"""
    if not line.startswith("Epoch ") or not line.endswith("(step)"):
        return None
    number = line.partition(" step ")[2].partition(" ")[0]
    return Step(int(number), float(line.partition("loss train: ")[2].partition(",")[0]))


def losses(folder: Path) -> dict[int, float]:
    """With all digits, from the file of its CSV logger."""
    found = {}
    for file in sorted(folder.rglob("metrics.csv")):
        with file.open(encoding="utf-8", newline="") as text:
            found |= {int(row["step"]): float(row["loss"]) for row in csv.DictReader(text) if row.get("loss")}
    return found


PEER = Peer(
    name="litgpt",
    command=command,
    step_of=step_of,
    losses=losses,
    order=order,
    note="has no packing for chats; does not clip; its learning rate starts at 0 and follows a cosine",
)
