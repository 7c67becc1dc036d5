"""The example data is its generator's output, balanced and short, and its splits share no template."""

import json
import re
import runpy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT

EMAILS = ROOT / "configs" / "emails"
SPLITS = ("train", "test")
MAX_SHARED_WORDS = 4
"""Longest run of words, without slots, that a train and a test template may share"""


def samples(split: str) -> list[list[dict[str, str]]]:
    lines = (EMAILS / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


@pytest.fixture(scope="module")
def templates() -> dict[str, Any]:
    return yaml.safe_load((EMAILS / "templates.yaml").read_text(encoding="utf-8"))


def runs_of_words(texts: list[str], length: int) -> set[tuple[str, ...]]:
    runs = set()
    for text in texts:
        for piece in re.split(r"\{\w+\}", text.lower()):
            words = re.findall(r"[\w'-]+", piece)
            runs |= {tuple(words[start : start + length]) for start in range(len(words) - length + 1)}
    return runs


def test_committed_files_are_the_generators_output(tmp_path: Path) -> None:
    runpy.run_path(str(EMAILS / "generate.py"))["main"](tmp_path)
    for split in SPLITS:
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (EMAILS / f"{split}.jsonl").read_bytes()


def test_enough_balanced_and_unique() -> None:
    seen: Counter[str] = Counter()
    for split, least in (("train", 400), ("test", 100)):
        rows = samples(split)
        assert len(rows) >= least
        labels = Counter(messages[-1]["content"] for messages in rows)
        assert set(labels) == {"invoice", "order", "support", "spam"}
        assert len(set(labels.values())) == 1
        seen.update(messages[1]["content"] for messages in rows)
        assert all([turn["role"] for turn in messages] == ["system", "user", "assistant"] for messages in rows)
    assert max(seen.values()) == 1


def test_splits_share_no_template_and_no_run_of_words(templates: dict[str, Any]) -> None:
    pools = [[text for texts in templates[split].values() for text in texts] for split in SPLITS]
    assert all(len(pool) == len(set(pool)) for pool in pools)
    assert not set(pools[0]) & set(pools[1])
    shared = runs_of_words(pools[0], MAX_SHARED_WORDS + 1) & runs_of_words(pools[1], MAX_SHARED_WORDS + 1)
    assert not shared


def test_no_single_word_gives_a_class_away(templates: dict[str, Any]) -> None:
    """Hard cases: words that name a class occur in other classes too."""
    for split in SPLITS:
        for word in ("bill", "invoice", "order", "password", "card"):
            classes = {
                label
                for label in ("invoice", "order", "support", "spam")
                if any(re.search(rf"\b{word}s?\b", text.lower()) for text in templates[split][label])
            }
            assert len(classes) >= (2 if split == "train" else 1), (split, word)
    for label in ("order", "support", "spam"):
        assert any("invoice" in text.lower() for text in templates["train"][label])


def test_varied_and_short_enough_for_a_cpu() -> None:
    texts = [messages[1]["content"] for messages in samples("train")]
    with_subject = sum(text.startswith(("Subject:", "subject:")) for text in texts)
    assert 0.5 < with_subject / len(texts) < 0.9
    lengths = [len(text.split()) for text in texts]
    assert 15 < sum(lengths) / len(lengths) < 35
    assert max(lengths) >= 2.5 * min(lengths)
