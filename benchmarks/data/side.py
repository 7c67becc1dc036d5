"""One side of a comparison in its own process: `python -m benchmarks.data.side SIDE FOLDER WORKERS`.

FOLDER holds chats.jsonl and tokenizer/. Prints JSON: tokens and seconds, excluding Python's start-up and imports.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def ours(folder: Path, tokenizer: Any, workers: int) -> int:
    from ft_dist.config.schema import DataConfig
    from ft_dist.data.prepare.build import prepare

    data = DataConfig.model_validate({"train": [str(folder / "chats.jsonl")], "cache_dir": str(folder / "ours")})
    return prepare(data.train, tokenizer, data=data, model_path="benchmark", workers=workers).counts[0].tokens


def map_with_mask(folder: Path, tokenizer: Any, workers: int) -> int:
    """One record at a time with the mask of the assistant's tokens, as TRL's SFTTrainer maps its data."""

    def encode(record: dict[str, Any]) -> dict[str, Any]:
        return dict(
            tokenizer.apply_chat_template(record["messages"], return_dict=True, return_assistant_tokens_mask=True)
        )

    return _mapped(folder, encode, workers, batched=False)


def map_batched(folder: Path, tokenizer: Any, workers: int) -> int:
    """A thousand records at a time without a label mask: the fastest plain form."""

    def encode(batch: dict[str, Any]) -> dict[str, Any]:
        texts = tokenizer.apply_chat_template(batch["messages"], tokenize=False)
        return dict(tokenizer(texts, add_special_tokens=False, return_attention_mask=False))

    return _mapped(folder, encode, workers, batched=True)


def _mapped(folder: Path, encode: Callable[..., dict[str, Any]], workers: int, *, batched: bool) -> int:
    import datasets

    rows = datasets.load_dataset(
        "json", data_files=str(folder / "chats.jsonl"), split="train", cache_dir=str(folder / "datasets")
    )
    done = rows.map(encode, num_proc=workers, batched=batched, remove_columns=["messages"])
    return sum(map(len, done["input_ids"]))


def tokenizer_alone(folder: Path, tokenizer: Any, workers: int) -> int:
    """`encode_batch` over rendered texts on the same number of threads: the upper bound for preparing."""
    lines = (folder / "chats.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False) for line in lines]
    started = time.perf_counter()
    tokens = 0
    for start in range(0, len(texts), 512):
        batch = tokenizer.backend_tokenizer.encode_batch(texts[start : start + 512], add_special_tokens=False)
        tokens += sum(map(len, batch))
    raise Measured(tokens, time.perf_counter() - started)


class Measured(Exception):  # noqa: N818 - a side that takes its own time
    """(tokens, seconds)"""


SIDES = {side.__name__: side for side in (ours, map_with_mask, map_batched, tokenizer_alone)}


def main() -> None:
    side, folder, workers = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder / "tokenizer"))
    started = time.perf_counter()
    try:
        tokens, seconds = SIDES[side](folder, tokenizer, workers), 0.0
        seconds = time.perf_counter() - started
    except Measured as measured:
        tokens, seconds = measured.args
    print(json.dumps({"tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds}))


if __name__ == "__main__":
    main()
