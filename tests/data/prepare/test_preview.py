"""`check` encodes the first records of every source as a run does: the same counts, the same refusals."""

import copy
import json
from pathlib import Path

import pytest

from ft_dist.config import validate
from ft_dist.data.prepare.preview import RECORDS, preview_data
from ft_dist.data.prepare.report import prepare_data
from ft_dist.errors import DataError, UserError


def chat(question: str, answer: str, *more: tuple[str, str]) -> dict:
    turns = [("user", question), ("assistant", answer), *more]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


GOOD = [chat(f"What is {n} plus {n}?", f"It is {n + n}.") for n in range(20)]
TWICE = chat("Why?", "So.", ("user", "a"), ("user", "b"), ("assistant", "c"))


def config_of(tmp_path: Path, rows: list[dict], eval_rows: list[dict] | None = None, **data):
    for name, some in (("train", rows), ("eval", eval_rows or [])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    tree = {"train": [str(tmp_path / "train.jsonl")], "cache_dir": str(tmp_path / "cache"), "max_length": 200, **data}
    if eval_rows:
        tree["eval"] = [str(tmp_path / "eval.jsonl")]
    optim = {"max_steps": 3}
    return validate({"model": {"path": "tiny"}, "data": tree, "optim": optim, "output_dir": str(tmp_path / "run")})


def test_the_counts_are_those_of_the_prepared_data_and_nothing_is_written(tmp_path, tokenizer_of):
    rows = [*GOOD, chat("word " * 200, "Yes."), chat("Why?", "So.", ("user", "And?"))]
    config = config_of(tmp_path, rows, GOOD[:5])
    before = sorted(tmp_path.rglob("*"))
    train, held_out = preview_data(config, tokenizer_of("chatml"))
    assert sorted(tmp_path.rglob("*")) == before
    prepared = prepare_data(config, tokenizer_of("chatml"), say=print, workers=1)
    for one, other in zip((train, held_out), prepared[:2], strict=True):
        assert [vars_of(one.counts)] == [vars_of(counts) for counts in other.counts]
        assert one.whole
    assert train.over_length == 1
    fact, *warnings = train.lines(config.data, model_path="tiny")
    assert "21 samples of " in fact
    assert "1 over data.max_length=200" in fact
    assert [line.partition(".jsonl: ")[2].partition(":")[0] for line in warnings] == [
        "1 sample dropped",
        "1 record without an answer at the end",
    ]


def vars_of(counts) -> dict:
    return {name: getattr(counts, name) for name in counts.__slots__ if name not in ("name", "format")}


def test_the_first_sample_is_shown_with_what_is_learnt_and_shortened(tmp_path, tokenizer_of):
    (one,) = preview_data(
        config_of(tmp_path, [chat("begin " + "word " * 100 + "end", "Yes.")], max_length=2000), tokenizer_of("chatml")
    )
    assert [run["text"] for run in one.sample if run["learnt"]] == ["Yes.<|im_end|>"]
    prompt = one.sample[0]["text"]
    assert prompt.startswith("<|im_start|>user\nbegin word")
    assert "word wo ... ord word" in prompt
    assert prompt.endswith("end<|im_end|>\n<|im_start|>assistant\n")
    assert len(prompt) < 130
    long = chat("Hi", "Hello", *(("user", "more"), ("assistant", "yes")) * 20)
    (one,) = preview_data(config_of(tmp_path, [long], max_length=2000), tokenizer_of("chatml"))
    assert len(one.sample) == 7
    assert one.sample[-1] == {"learnt": False, "text": " ... "}


@pytest.mark.parametrize(
    "template, rows, options",
    [
        ("mistral", [*GOOD, TWICE], {}),
        ("chatml", [*GOOD, chat("Tell it.", "word " * 100)], {"too_long": "error"}),
        ("chatml", [chat("word " * 100, "Yes.")], {}),
        ("chatml", [chat("word " * 100, "Yes.")] * 3, {"too_long": "truncate"}),
        (None, GOOD, {}),
    ],
)
def test_what_a_run_refuses_is_refused_with_the_same_words(tmp_path, tokenizer_of, template, rows, options):
    tokenizer = copy.deepcopy(tokenizer_of(template or "chatml"))
    if template is None:
        tokenizer.chat_template = None
    config = config_of(tmp_path, rows, **options)
    with pytest.raises(UserError) as refusal:
        prepare_data(config, tokenizer, say=print, workers=1)
    with pytest.raises(UserError) as ours:
        preview_data(config, tokenizer)
    assert (type(ours.value), str(ours.value)) == (type(refusal.value), str(refusal.value))


def test_the_beginning_of_a_source_does_not_condemn_the_rest(tmp_path, tokenizer_of):
    config = config_of(tmp_path, [*[chat("word " * 100, "Yes.")] * RECORDS, *GOOD])
    (one,) = preview_data(config, tokenizer_of("chatml"))
    (line,) = one.lines(config.data, model_path="tiny")
    assert line.startswith(f"warning: train {tmp_path / 'train.jsonl'}: at its beginning, none of 64 records can be")
    assert one.sample == []


def test_prepared_and_live_sources(tmp_path, tokenizer_of):
    tokenizer = tokenizer_of("chatml")
    config = config_of(tmp_path, GOOD)
    place = str(tmp_path / "set")
    prepare_data(config, tokenizer, say=print, to=place, workers=1)
    (one,) = preview_data(config_of(tmp_path, GOOD, train=f"{place}/train-0"), tokenizer)
    assert (one.counts.samples, one.whole) == (20, True)
    assert any(run["learnt"] for run in one.sample)
    with pytest.raises(DataError, match=r"prepared with a different data\.max_length \(200, the config says 100\)"):
        preview_data(config_of(tmp_path, GOOD, train=f"{place}/train-0", max_length=100), tokenizer)
    live = [{"path": str(tmp_path / "train.jsonl"), "live": True}]
    (one,) = preview_data(config_of(tmp_path, GOOD, train=live), tokenizer)
    assert one.counts.samples == 20
