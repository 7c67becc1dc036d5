"""Writes what every side trains on: CSV or JSON Lines -> chats, a checkpoint, and the order of the rows.

Our order is a keyed permutation that depends on the data, so it comes first: `in_our_order` asks our stream
which samples it deals and writes the same chats in that order for the peers, which read them from first to last.
"""

import csv
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEMPLATE = Path(__file__).with_name("chatml.jinja")
SYSTEM = "Sort the customer's message into one of the known intents."
"""In every chat, because some templates add their own system prompt if there is none"""


@dataclass(frozen=True)
class Counts:
    """Tokens of every optimizer step, counted by our own data path."""

    real: list[int]
    labelled: list[int]


def read_chats(path: Path) -> list[dict[str, Any]]:
    """All chats of a file. A CSV's first column is the user's message, its second the assistant's answer.

    Raises SystemExit for any other kind of file.
    """
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            _, *rows = csv.reader(file)
        return [chat(row[0], row[1]) for row in rows]
    chats = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not chats or any(set(row) < {"messages"} for row in chats):
        raise SystemExit(f"{path}: neither a CSV of two columns nor JSON Lines of chats (messages).")
    return chats


def chat(question: str, answer: str) -> dict[str, Any]:
    """A system prompt, one question, one answer."""
    turns = [("system", SYSTEM), ("user", question.strip()), ("assistant", answer.strip())]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def spread(chats: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """`count` evenly spaced chats, since files are often sorted. Raises SystemExit if there are fewer."""
    if len(chats) < count:
        raise SystemExit(
            f"{count} rows are needed (steps x rows per step), the data has {len(chats)}. Ask for fewer steps."
        )
    return [chats[at * len(chats) // count] for at in range(count)]


def write_jsonl(path: Path, chats: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chats), encoding="utf-8")
    return path


def in_our_order(config: Any, chats: Sequence[dict[str, Any]], steps: int) -> tuple[list[dict[str, Any]], Counts]:
    """The chats of `config`'s first steps as our stream deals them, and the tokens of each step.

    `config` is a RunConfig without packing whose only source holds `chats`.
    """
    from ft_dist.data.open import open_stream
    from ft_dist.data.prepare.build import prepare
    from ft_dist.model.tokenizer import load_tokenizer

    tokenizer, _ = load_tokenizer(config.model.path)
    prepared = prepare(config.data.train, tokenizer, data=config.data, model_path=config.model.path)
    kept = len(prepared.store)
    if kept != len(chats):
        raise SystemExit(f"{len(chats) - kept} of {len(chats)} rows are longer than max_length: sides would differ.")
    stream = open_stream(config, tokenizer, prepared)
    batches = [stream.next_batch() for _ in range(steps)]
    ordered = [chats[sample] for batch in batches for sample in batch.sample_ids]
    return ordered, Counts([batch.real_tokens for batch in batches], [batch.labelled_tokens for batch in batches])


def deal(chats: Sequence[dict[str, Any]], order: Sequence[int]) -> list[dict[str, Any]]:
    """`chats` rearranged so that a loader that takes row `order[i]` at position i reads them in our order."""
    placed: list[dict[str, Any]] = [{}] * len(chats)
    for position, row in enumerate(order):
        placed[row] = chats[position]
    return placed


def checkpoint(name: str, dtype: str, cache: Path) -> Path:
    """`name` (built-in, folder or hub id) in `dtype` with the chat template of every side, made once.

    The template ends the last answer at its end token: line breaks, which only some peers would train on,
    come only between turns.
    """
    from ft_dist.model.builtin import resolve_model
    from ft_dist.model.folder import whole_folder

    text = TEMPLATE.read_text(encoding="utf-8")
    final = cache / f"{Path(name).name}-{dtype}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    if final.is_dir():
        return final
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = resolve_model(name)
    cache.mkdir(parents=True, exist_ok=True)
    with whole_folder(final) as folder:
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        )
        model.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(source)
        # peers without generation marks read the tokenizer's own template
        tokenizer.chat_template = text.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
        tokenizer.eos_token = "<|im_end|>" if "<|im_end|>" in tokenizer.get_vocab() else tokenizer.eos_token
        tokenizer.save_pretrained(folder)
    return final


def longest(config: Any) -> int:
    """Tokens of the longest sample of `config`'s data; prepares the data."""
    from ft_dist.data.prepare.build import prepare
    from ft_dist.model.tokenizer import load_tokenizer

    tokenizer, _ = load_tokenizer(config.model.path)
    prepared = prepare(config.data.train, tokenizer, data=config.data, model_path=config.model.path)
    import numpy as np

    return int(prepared.store.lengths_of(np.arange(len(prepared.store))).max())
