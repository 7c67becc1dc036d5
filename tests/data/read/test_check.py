"""The first check is fast, imports nothing heavy, and finds each planted fault."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ft_dist.config.schema import DataConfig
from ft_dist.data.read.check import check_sources
from ft_dist.errors import DataError

GOOD = {"messages": [{"role": "user", "content": "q " * 50}, {"role": "assistant", "content": "a"}]}
SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"


def write(path: Path, rows: list) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_facts_name_format_and_count(tmp_path):
    train, held_out = write(tmp_path / "a.jsonl", [GOOD] * 3), write(tmp_path / "b.txt", ["one", "", "two"])
    assert check_sources(DataConfig(train=[train], eval=[held_out])) == [
        f"train {train}: format chat, 3 samples",
        f"eval {held_out}: format text, 2 samples",
    ]


def test_reading_a_record_costs_little_compared_with_parsing_it(tmp_path):
    path = Path(write(tmp_path / "a.jsonl", [GOOD] * 10_000))
    data = DataConfig(train=[str(path)])

    def processor_s(call: Callable[[], object]) -> float:
        started = time.process_time()
        call()
        return time.process_time() - started

    parsing = min(processor_s(lambda: [json.loads(line) for line in path.read_text().splitlines()]) for _ in range(3))
    ratio = min(processor_s(lambda: check_sources(data)) for _ in range(3)) / parsing
    assert ratio < 15, "two to three as a rule"


def test_nothing_heavy_is_imported():
    code = (
        "import sys, ft_dist.data.read.check\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'pyarrow', 'jinja2', 'tokenizers'}\n"
        "print(sorted(heavy.intersection(sys.modules)))"
    )
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


FAULTS = {
    "broken JSON": ([GOOD, '{"messages": ['], r"line 2: not valid JSON"),
    "no assistant turn": ([GOOD, GOOD, {"messages": GOOD["messages"][:1]}], r"line 3: no assistant turn"),
    "unknown format": ([{"a": 1, "b": 2}], r"line 1: unknown format, keys are a, b"),
    "mixed formats": ([GOOD, {"text": "x"}], r"line 2: a text record in a source of format chat"),
    "null content": (
        [{"messages": [{"role": "user", "content": None}]}],
        r"line 1: messages\[0\] \(user\): content is nu",
    ),
    "empty": ([], r"has no records"),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("part", ["train", "eval"])
def test_planted_fault_is_found(tmp_path, name, part):
    rows, message = FAULTS[name]
    good, bad = write(tmp_path / "good.jsonl", [GOOD]), write(tmp_path / "bad.jsonl", rows)
    sources = {"train": [good], "eval": [good], part: [bad]}
    with pytest.raises(DataError, match=message) as raised:
        check_sources(DataConfig(**sources))
    assert "bad.jsonl" in str(raised.value)


def test_missing_file_is_found(tmp_path):
    with pytest.raises(DataError, match=r"gone\.jsonl: neither a file"):
        check_sources(DataConfig(train=[str(tmp_path / "gone.jsonl")]))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not here")
def test_real_data_sets():
    data = DataConfig(
        train=[
            {"path": str(SHARED / "gsm8k/train.jsonl"), "columns": {"prompt": "question", "completion": "answer"}},
            {"path": str(SHARED / "banking77/train.csv"), "columns": {"prompt": "text", "completion": "category"}},
        ]
    )
    facts = check_sources(data)
    assert [fact.rpartition(": ")[2] for fact in facts] == [
        "format prompt_completion, 7,473 samples",
        "format prompt_completion, 10,003 samples",
    ]
