"""The measurements: rate and memory of preparing, fill of packed rows, the loader's rate, the time of a seek."""

import csv
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data.inputs import train_tokenizer, write_chats
from benchmarks.data.side import SIDES
from ft_dist.config.schema import DataConfig
from ft_dist.data.prepare.build import prepare
from ft_dist.data.stream.batch import Prefetcher
from ft_dist.data.stream.mixture import MixtureSource
from ft_dist.data.stream.packing import DEFAULT_WINDOW, pack_window
from ft_dist.data.stream.stream import DataStream

ROOT = Path(__file__).resolve().parents[2]
CAPACITY = 2048
TRL_BATCH = 1000
"""Samples that TRL packs together: the default batch of `datasets.map`"""


def rates(megabytes: int, workers: int) -> dict[str, Any]:
    """Tokens/s of every side on the same chats, each in its own process."""
    with tempfile.TemporaryDirectory() as name:
        folder = _inputs(Path(name), megabytes)
        return {side: _side(side, folder, workers)[0] for side in SIDES}


def memory(megabytes: int, workers: int) -> dict[str, Any]:
    """Peak resident memory of preparing, summed over its processes."""
    with tempfile.TemporaryDirectory() as name:
        result, peak = _side("ours", _inputs(Path(name), megabytes), workers)
        return {"input_mb": megabytes, "peak_mb": round(peak / 1e6), **result}


def fullness(lengths: np.ndarray) -> dict[str, float]:
    """Share of the rows' slots that hold tokens: ours, and TRL's `bfd` (best-fit decreasing, in its own batch size)."""
    sizes = np.minimum(lengths, CAPACITY)
    windows = np.array_split(sizes, max(1, len(sizes) // DEFAULT_WINDOW))
    ours = sum(len(pack_window(window, CAPACITY)) for window in windows)
    theirs = sum(_best_fit_decreasing(sizes[at : at + TRL_BATCH].tolist()) for at in range(0, len(sizes), TRL_BATCH))
    total = int(sizes.sum())
    return {"ours": total / (ours * CAPACITY), "trl_bfd": total / (theirs * CAPACITY)}


def _best_fit_decreasing(sizes: list[int]) -> int:
    """Number of rows that trl.data_utils.pack_dataset(strategy="bfd") fills, by its published rule."""
    spaces: list[int] = []  # sorted
    for size in sorted(sizes, reverse=True):
        at = int(np.searchsorted(spaces, size))
        space = spaces.pop(at) if at < len(spaces) else CAPACITY
        spaces.insert(int(np.searchsorted(spaces, space - size)), space - size)
    return len(spaces)


def sample_lengths(shared: Path) -> dict[str, np.ndarray]:
    """Tokens per sample (four characters each) of GSM8K and Banking77 if present, and of log-normal chats."""
    found = {"log-normal": np.random.default_rng(0).lognormal(5.3, 0.75, 50_000).astype(np.int64) + 8}
    gsm8k, banking = shared / "gsm8k" / "train.jsonl", shared / "banking77" / "train.csv"
    if gsm8k.is_file():
        rows = [json.loads(line) for line in gsm8k.read_text(encoding="utf-8").splitlines()]
        found["gsm8k"] = np.array([len(row["question"] + row["answer"]) // 4 + 12 for row in rows])
    if banking.is_file():
        with banking.open(encoding="utf-8") as file:
            found["banking77"] = np.array([len(r["text"] + r["category"]) // 4 + 12 for r in csv.DictReader(file)])
    return found


def loader(megabytes: int, batches: int) -> dict[str, float]:
    """Tokens/s that one process packs and collates from memory-mapped shards."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_chats(folder / "chats.jsonl", megabytes * 1_000_000)
        data = DataConfig.model_validate({"train": [str(folder / "chats.jsonl")], "cache_dir": name})
        tokenizer = train_tokenizer(folder / "chats.jsonl")
        prepared = prepare(data.train, tokenizer, data=data, model_path="benchmark")
        stream = DataStream(prepared.sources, seed=0, global_rows=64, max_length=CAPACITY, packing=True)
        with Prefetcher(stream, rank=0, world=1, micro_rows=8) as batches_ahead:
            next(batches_ahead)
            started = time.perf_counter()
            tokens = sum(one.batch.real_tokens for one in itertools.islice(batches_ahead, batches))
            return {"tokens_per_s": tokens / (time.perf_counter() - started)}


class _Virtual:
    """Two billion samples that do not exist: only their lengths are read."""

    fingerprint = "virtual"

    def __len__(self) -> int:
        return 2_000_000_000

    def lengths_of(self, ids: np.ndarray) -> np.ndarray:
        return 50 + ids % 400

    def labelled_of(self, ids: np.ndarray) -> np.ndarray:
        return 25 + ids % 200

    def gather(self, ids: np.ndarray) -> Any:
        raise AssertionError("a seek reads no sample")

    def expect(self, ids: np.ndarray) -> None:
        """Does nothing."""


def seek(position: int) -> float:
    """Seconds to open the stream and read the first batch after `position` samples."""
    started = time.perf_counter()
    sources = [MixtureSource("virtual", _Virtual())]
    stream = DataStream(sources, seed=0, global_rows=64, max_length=CAPACITY, packing=True)
    state = stream.state_dict()
    stream.load_state_dict(state | {"window": position // DEFAULT_WINDOW})
    stream.next_batch()
    return time.perf_counter() - started


def _inputs(folder: Path, megabytes: int) -> Path:
    write_chats(folder / "chats.jsonl", megabytes * 1_000_000)
    train_tokenizer(folder / "chats.jsonl").save_pretrained(str(folder / "tokenizer"))
    return folder


def _side(side: str, folder: Path, workers: int) -> tuple[dict[str, float], int]:
    """(its result, the peak resident memory in bytes summed over its processes)."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {
        "PYTHONPATH": paths,
        "RAYON_NUM_THREADS": str(workers),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.data.side", side, str(folder), str(workers)]
    with tempfile.TemporaryFile("w+") as out, subprocess.Popen(command, env=environment, stdout=out) as process:
        peak = 0
        while process.poll() is None:
            peak = max(peak, _tree_bytes(process.pid))
            time.sleep(0.1)
        if process.returncode:
            raise SystemExit(f"{side} failed")
        out.seek(0)
        return json.loads(out.read().strip().splitlines()[-1]), peak


def _tree_bytes(pid: int) -> int:
    """Proportional set size (`smaps_rollup`) of a process and its children, so shared pages count once."""
    try:
        pages = Path(f"/proc/{pid}/smaps_rollup").read_text()
        own = int(pages.partition("Pss:")[2].split()[0]) * 1024
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (OSError, IndexError):
        return 0
    return own + sum(_tree_bytes(int(child)) for child in children)
