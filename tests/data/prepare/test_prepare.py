"""Data is prepared once and found again by fingerprint, and every dropped sample is counted."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from ft_dist.config.schema import DataConfig
from ft_dist.data.prepare.build import Progress, prepare
from ft_dist.errors import DataError


def write_chats(path: Path, answers: list[str]) -> Path:
    with path.open("w", encoding="utf-8") as file:
        for answer in answers:
            turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


def run(tmp_path: Path, path: Path, tokenizer, **options):
    data = DataConfig(train=[str(path)], cache_dir=str(tmp_path / "cache"), **options)
    return prepare(data.train, tokenizer, data=data, model_path="tiny")


def small_shards(monkeypatch):
    monkeypatch.setattr("ft_dist.data.store.writer.SHARD_TOKENS", 100)
    monkeypatch.setattr("ft_dist.data.prepare.build.CHUNK_RECORDS", 3)


def test_the_store_holds_the_encoders_output(tmp_path, tokenizer_of):
    from ft_dist.data.encode.template import encode
    from ft_dist.data.read.formats import read_samples

    tokenizer = tokenizer_of("llama3")
    path = write_chats(tmp_path / "a.jsonl", [f"answer the {'x' * n}" for n in range(40)])
    prepared = run(tmp_path, path, tokenizer)
    store = prepared.store
    source = DataConfig(train=[str(path)]).train[0]
    encoded = [encode(sample, tokenizer) for sample in read_samples(source)]
    assert len(store) == len(encoded) == 40
    for index, one in enumerate(encoded):
        tokens, mask = store.sample(index)
        assert tokens.tolist() == one.tokens.tolist()
        assert mask.tolist() == one.mask.tolist()
        assert store.lengths_of(np.array([index])) == len(one.tokens)
        assert store.labelled_of(np.array([index])) == sum(one.mask[1:])
    assert prepared.counts[0].labelled_tokens == int(prepared.stores[0].labelled.sum())
    assert prepared.report["samples"] == 40


def test_a_second_call_finds_the_set_and_changes_are_noticed(tmp_path, tokenizer_of):
    tokenizer = tokenizer_of("chatml")
    path = write_chats(tmp_path / "a.jsonl", ["one", "two"])
    first = run(tmp_path, path, tokenizer)
    again = run(tmp_path, path, tokenizer)
    assert (first.reused, again.reused) == ([False], [True])
    assert first.counts == again.counts
    assert run(tmp_path, path, tokenizer, max_length=64).reused == [False]
    assert run(tmp_path, path, tokenizer_of("llama3")).reused == [False]
    write_chats(path, ["one", "too"])
    assert run(tmp_path, path, tokenizer).reused == [False]


@pytest.mark.parametrize("damage", ["truncate", "lengths", "delete", "index"])
def test_damaged_set_is_rebuilt(tmp_path, tokenizer_of, damage):
    tokenizer = tokenizer_of("chatml")
    path = write_chats(tmp_path / "a.jsonl", ["one", "two"])
    folder = Path(run(tmp_path, path, tokenizer).stores[0].name)
    shard = folder / ("lengths.safetensors" if damage == "lengths" else "tokens-00000.safetensors")
    if damage in ("truncate", "lengths"):
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "delete":
        shard.unlink()
    else:
        (folder / "index.json").write_text('{"version": 1, ')
    rebuilt = run(tmp_path, path, tokenizer)
    assert rebuilt.reused == [False]
    assert len(rebuilt.store) == 2


@pytest.mark.parametrize("name", ["tokens-00000.safetensors", "lengths.safetensors"])
def test_flipped_byte_is_named_by_verify(tmp_path, tokenizer_of, name):
    path = write_chats(tmp_path / "a.jsonl", ["one", "two"])
    store = run(tmp_path, path, tokenizer_of("chatml")).stores[0]
    store.verify()
    shard = Path(store.name) / name
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: damaged"):
        store.verify()


def test_samples_continue_across_shards(tmp_path, tokenizer_of, monkeypatch):
    path = write_chats(tmp_path / "a.jsonl", [f"answer {'x' * n}" for n in range(30)])
    whole = run(tmp_path, path, tokenizer_of("chatml")).store
    small_shards(monkeypatch)
    prepared = run(tmp_path / "again", path, tokenizer_of("chatml"))
    assert len(prepared.stores[0].index.shards) > 5
    for index in range(30):
        for one, other in zip(whole.sample(index), prepared.store.sample(index), strict=True):
            assert np.array_equal(one, other)


def test_no_sources_prepare_to_nothing(tmp_path, tokenizer_of):
    data = DataConfig(train=["unused"], cache_dir=str(tmp_path / "cache"))
    prepared = prepare(data.eval, tokenizer_of("chatml"), data=data, model_path="tiny")
    assert len(prepared.store) == prepared.report["samples"] == 0


def test_too_long_follows_the_rule_and_is_counted(tmp_path, tokenizer_of):
    tokenizer = tokenizer_of("chatml")
    path = write_chats(tmp_path / "a.jsonl", ["short", "long " * 50, "short"])
    dropped = run(tmp_path, path, tokenizer, max_length=64)
    assert (dropped.counts[0].samples, dropped.counts[0].dropped_too_long) == (2, 1)
    cut = run(tmp_path, path, tokenizer, max_length=64, too_long="truncate")
    assert (cut.counts[0].samples, cut.counts[0].truncated) == (3, 1)
    assert cut.stores[0].lengths.max() == 64
    with pytest.raises(DataError, match=r"a\.jsonl line 2: 2\d\d tokens, but data\.max_length=64"):
        run(tmp_path, path, tokenizer, max_length=64, too_long="error")


def test_truncation_that_leaves_no_answer_drops_the_sample(tmp_path, tokenizer_of):
    path = tmp_path / "a.jsonl"
    pairs = [("x" * 200, "y"), ("x", "y")]
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs))
    prepared = run(tmp_path, path, tokenizer_of("chatml"), max_length=64, too_long="truncate")
    counts = prepared.counts[0]
    assert (counts.samples, counts.truncated, counts.dropped_no_label) == (1, 0, 1)


def test_long_text_becomes_blocks_that_predict_every_token_once(tmp_path, tokenizer_of):
    tokenizer = tokenizer_of("base")
    path = tmp_path / "a.txt"
    path.write_text("the thing is the ring " * 20 + "\n\nshort\n")
    prepared = run(tmp_path, path, tokenizer, max_length=32)
    whole = [*tokenizer("the thing is the ring " * 20)["input_ids"], tokenizer.eos_token_id]
    store, counts = prepared.store, prepared.counts[0]
    assert (counts.records, counts.split_texts) == (2, 1)
    targets = np.concatenate([store.sample(index)[0][1:] for index in range(len(store) - 1)])
    assert targets.tolist() == whole[1:]


def test_no_usable_sample_is_an_error_with_the_reason(tmp_path, tokenizer_of):
    path = write_chats(tmp_path / "a.jsonl", ["long " * 50] * 3)
    with pytest.raises(DataError, match=r"none of 3 records can be used: 3 over data\.max_length=16 \(longest: 2\d\d"):
        run(tmp_path, path, tokenizer_of("chatml"), max_length=16)
    assert not [name for name in os.listdir(tmp_path / "cache" / "data") if "tmp" in name]


def test_a_template_that_hides_every_answer_is_reported(tmp_path, tokenizer_of):
    tokenizer = tokenizer_of("chatml")
    path = write_chats(tmp_path / "a.jsonl", ["one", "two"])
    template = tokenizer.chat_template
    tokenizer.chat_template = template.replace("m['content']", "m['content'] | upper")
    try:
        prepared = run(
            tmp_path, path, tokenizer
        )  # upper case differs from the record's text, but the turn is still complete
        assert tokenizer.decode(prepared.store.sample(0)[0][prepared.store.sample(0)[1]]) == "ONE<|im_end|>"
        tokenizer.chat_template = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
        with pytest.raises(DataError, match=r"2 without a labelled token, 2 assistant turns rewritten"):
            run(tmp_path, path, tokenizer)
    finally:
        tokenizer.chat_template = template


def test_progress_counts_over_all_sources(tmp_path, tokenizer_of):
    paths = [write_chats(tmp_path / name, ["one"] * 600) for name in ("a.jsonl", "b.jsonl")]
    write_chats(paths[1], ["two"] * 600)
    data = DataConfig(train=[str(path) for path in paths], cache_dir=str(tmp_path / "cache"))
    seen: list[Progress] = []
    prepare(data.train, tokenizer_of("chatml"), data=data, model_path="tiny", on_progress=seen.append)
    assert [now.records for now in seen] == [512, 600, 1112, 1200]
    assert [now.tokens for now in seen] == sorted(now.tokens for now in seen)
    assert [now.share for now in seen] == pytest.approx([512 / 600, 1, 512 / 600, 1], abs=0.01)


def test_unwritable_cache_is_named(tmp_path, tokenizer_of):
    (tmp_path / "cache").write_text("a file, not a folder")
    path = write_chats(tmp_path / "a.jsonl", ["one"])
    with pytest.raises(DataError, match=r"cache/data: .*/cache is not a folder. Set data\.cache_dir"):
        run(tmp_path, path, tokenizer_of("chatml"))


def test_concurrent_callers_prepare_once(tmp_path, tokenizer_of):
    path = write_chats(tmp_path / "a.jsonl", [f"number {n}" for n in range(3000)])
    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(run, tmp_path, path, tokenizer_of("chatml")) for _ in range(3)]
        assert sorted(job.result().reused for job in jobs) == [[False], [True], [True]]
