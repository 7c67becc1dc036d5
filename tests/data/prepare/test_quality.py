"""Each planted fault is found and named; clean data has no finding."""

import json
from pathlib import Path

import pytest

from ft_dist.config import validate
from ft_dist.data.prepare.report import prepare_data, recommended_epochs, report_lines, shown_lines
from ft_dist.errors import DataError
from tests.conftest import ROOT

SHARED = ROOT.parent / "shared" / "data"
STORY = (
    "Once there was a miller who had three sons, a mill, a donkey and a cat number {n}, as they say. The sons had to "
    "grind, the donkey had to carry the corn and fetch the flour, and the cat had to catch the mice, all of the mice "
    "of them in a row."
)


def chat(prompt: str, answer: str, *extra: tuple[str, str]) -> dict:
    turns = [("user", prompt), ("assistant", answer), *extra]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def clean(count: int, start: int = 0) -> list[dict]:
    """Chats that have little in common."""
    return [chat(f"What is {n} times {n}?", f"It is {n * n}.") for n in range(start, start + count)]


def report_of(tmp_path: Path, tokenizer, train: list[dict], held_out: list[dict] | None = None, **options):
    tmp_path.mkdir(exist_ok=True)
    data = {"train": [write(tmp_path / "train.jsonl", train)], "cache_dir": str(tmp_path / "cache"), **options}
    if held_out is not None:
        data["eval"] = [write(tmp_path / "eval.jsonl", held_out)]
    config = validate({"model": {"path": "tiny"}, "data": data, "output_dir": str(tmp_path / "run")})
    return prepare_data(config, tokenizer, say=print, workers=1)[2]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


FAULTS = {
    "exact duplicate": ([chat("What is  5 times 5?", "it is 25.")], {}, "1 duplicate record (records 6 and 201)"),
    "near duplicate": (
        [chat("Tell it.", STORY.format(n=1)), chat("Tell it.", STORY.format(n=2))],
        {},
        "1 near duplicate among the records (records 201 and 202)",
    ),
    "contradiction": (
        [chat("What is 5 times 5?", "It is 26.")],
        {},
        "1 prompt with different answers (records 6 and 201)",
    ),
    "too long": (
        [chat("Tell it.", "word " * 200)],
        {"max_length": 200},
        "1 sample dropped: longer than data.max_length",
    ),
    "truncated": (
        [chat("Tell it.", "word " * 200)],
        {"max_length": 200, "too_long": "truncate"},
        "1 sample truncated at data.max_length",
    ),
    "answer cut off": (
        [chat("word " * 200, "Yes.")],
        {"max_length": 200, "too_long": "truncate"},
        "1 sample dropped: no labelled token was left",
    ),
    "two user turns": (
        [chat("Why?", "So.", ("user", "a"), ("user", "b"), ("assistant", "c"))],
        {},
        "1 record with roles out of order",
    ),
    "no last answer": ([chat("Why?", "So.", ("user", "And?"))], {}, "1 record without an answer at the end"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_found_and_no_other(tmp_path, tokenizer_of, name):
    rows, options, message = FAULTS[name]
    report = report_of(tmp_path, tokenizer_of("chatml"), clean(200) + rows, **options)
    expected = [message] if name != "near duplicate" else [message, "1 prompt with different answers"]
    found = report["warnings"]
    assert len(found) == len(expected), found
    for part, warning in zip(expected, found, strict=True):
        assert warning.startswith(f"train {tmp_path / 'train.jsonl'}: {part}")


def test_one_of_a_kind_is_in_the_singular(tmp_path, tokenizer_of):
    lines = report_lines(report_of(tmp_path, tokenizer_of("chatml"), clean(1)))
    assert f"train {tmp_path / 'train.jsonl'}: 1 sample, " in lines[0]
    assert lines[1] == "about 1 step; for this many samples 25 epochs are a good start"
    assert lines[2].startswith("warning: only 1 training sample; ")


def test_clean_data_has_no_warning(tmp_path, tokenizer_of):
    report = report_of(tmp_path, tokenizer_of("chatml"), clean(200), clean(20, start=1000))
    assert report["warnings"] == report["notes"] == []
    assert report["leakage"]["records"] == 20


def test_leaks_are_found_exact_and_near(tmp_path, tokenizer_of):
    train = [*clean(200), chat("Tell it.", STORY.format(n=1))]
    held_out = [*clean(5, start=1000), chat("What is 7 times 7?", "Do not know."), chat("Tell me.", STORY.format(n=1))]
    report = report_of(tmp_path, tokenizer_of("chatml"), train, held_out)
    assert {name: report["leakage"][name] for name in ("equal", "near", "records")} == {
        "equal": 1,
        "near": 1,
        "records": 7,
    }
    (warning,) = report["warnings"]
    assert "of 7 held-out records 1 are in the training data and 1 nearly match" in warning
    assert f"record 6 of {tmp_path / 'eval.jsonl'} and 8 of {tmp_path / 'train.jsonl'}" in warning
    assert f"record 7 of {tmp_path / 'eval.jsonl'} and 201 of" in warning


def test_few_samples_are_reported(tmp_path, tokenizer_of):
    report = report_of(tmp_path, tokenizer_of("chatml"), clean(12))
    assert report["warnings"] == ["only 12 training samples; fine-tuning needs at least 50 to 100 good ones"]
    assert report["recommended_epochs"] == 9


def test_a_template_that_prints_the_date_prints_the_same_one_for_ever(tmp_path, tokenizer_of):
    tokenizer = tokenizer_of("chatml")
    template = tokenizer.chat_template
    tokenizer.chat_template = "Today is {{ strftime_now('%d %b %Y') }}.\n" + template
    try:
        report = report_of(tmp_path, tokenizer, clean(100))
    finally:
        tokenizer.chat_template = template
    assert report["train"]["sources"][0]["shown"][0][0]["text"].startswith("Today is 26 Jul 2024.")
    assert report["notes"] == [
        f"train {tmp_path / 'train.jsonl'}: 100 samples with 26 July 2024 where the chat template prints today's date"
    ]


def test_the_shown_sample_is_the_labelled_one(tmp_path, tokenizer_of):
    report = report_of(tmp_path, tokenizer_of("chatml"), clean(101))
    first, middle, last = report["train"]["sources"][0]["shown"]
    assert "".join(run["text"] for run in middle if run["learnt"]) == "It is 2500.<|im_end|>"
    assert first[0]["text"] == "<|im_start|>user\nWhat is 0 times 0?<|im_end|>\n<|im_start|>assistant\n"
    assert "What is 100 times 100?" in last[0]["text"]
    assert "  | [[It is 2500.<|im_end|>]]" in shown_lines(report)
    lengths = report["train"]["sources"][0]["lengths"]
    assert sum(entry["samples"] for entry in lengths["bins"]) == 101
    assert report_lines(report)[0].startswith(f"train {tmp_path / 'train.jsonl'}: 101 samples")


def test_faults_of_records_are_reported_together(tmp_path):
    from ft_dist.config.schema import DataConfig
    from ft_dist.data.read.check import check_sources

    bad = [
        chat("Why?", " "),
        {"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]},
        {"messages": [{"role": "user", "content": None}]},
        {"text": "another format"},
    ]
    path = write(tmp_path / "train.jsonl", [*clean(3), *bad])
    with pytest.raises(DataError) as raised:
        check_sources(DataConfig.model_validate({"train": [path]}))
    message = str(raised.value)
    assert "\n" not in message
    for line, part in (
        (4, "content is empty"),
        (5, "before any user turn"),
        (6, "content is null"),
        (7, "a text record"),
    ):
        assert f"{path} line {line}: " in message
        assert part in message


def test_epochs_follow_the_published_rule():
    assert [recommended_epochs(n) for n in (1, 10, 40, 1000, 10_000, 100_000)] == [25, 10, 3, 3, 2, 1]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not here")
def test_nothing_is_found_in_clean_gsm8k(tmp_path, tokenizer_of):
    sources = [
        {"path": str(SHARED / f"gsm8k/{split}.jsonl"), "columns": {"prompt": "question", "completion": "answer"}}
        for split in ("train", "test")
    ]
    data = {"train": [sources[0]], "eval": [sources[1]], "cache_dir": str(tmp_path)}
    config = validate({"model": {"path": "tiny"}, "data": data, "output_dir": str(tmp_path / "run")})
    report = prepare_data(config, tokenizer_of("chatml"), say=print, workers=1)[2]
    assert report["train"]["samples"] == 7473
    assert report["warnings"] == []
