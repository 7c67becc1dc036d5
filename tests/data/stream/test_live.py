"""A live source gives the same rows to every reader, wherever reading resumes."""

import json
import multiprocessing

import numpy as np
import pytest

from ft_dist.config.schema import DataConfig, RunConfig
from ft_dist.data.encode.template import encode
from ft_dist.data.read.formats import read_samples
from ft_dist.data.stream.batch import Prefetcher, collate
from ft_dist.data.stream.live import LiveStream
from ft_dist.errors import DataError

RECORDS = 150


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same records as JSON lines and as a saved dataset."""
    import datasets

    folder = tmp_path_factory.mktemp("live")
    generator = np.random.default_rng(0)
    records = [{"prompt": f"say {n}", "completion": "x" * int(generator.integers(1, 60))} for n in range(RECORDS)]
    records[70]["completion"] = "long " * 50
    lines = folder / "a.jsonl"
    lines.write_text("".join(json.dumps(record) + "\n" for record in records))
    datasets.Dataset.from_list(records).save_to_disk(str(folder / "saved"), num_shards=3)
    return {"lines": str(lines), "saved": str(folder / "saved")}


def make(path: str, tokenizer, *, workers=1, **options) -> LiveStream:
    data = DataConfig(train=[{"path": path, "live": True}], max_length=128, **options)
    return LiveStream(data.train[0], tokenizer, data=data, seed=1, global_rows=5, workers=workers, window=32)


def walk(stream: LiveStream, epochs: int):
    """(batch, its input ids, the state after it), for a number of epochs."""
    steps = []
    while not steps or steps[-1][2]["epoch"] < epochs:
        batch = stream.next_batch()
        state = json.loads(json.dumps(stream.state_dict()))
        steps.append((batch, collate(batch.rows, stream.store).input_ids.tolist(), state))
    return steps


@pytest.mark.parametrize("kind", ["lines", "saved"])
def test_every_record_once_per_epoch_and_exact_resume(sources, tokenizer_of, kind):
    tokenizer = tokenizer_of("chatml")
    stream = make(sources[kind], tokenizer)
    steps = walk(stream, 2)
    stream.close()
    source = DataConfig(train=[sources["lines"]]).train[0]
    expected = sorted(len(encode(sample, tokenizer).tokens) for sample in read_samples(source))[:-1]
    epochs = [[step for step in steps if step[0].epoch == epoch] for epoch in (0, 1)]
    for epoch in epochs:
        ids = [sample for batch, _, _ in epoch for sample in batch.sample_ids]
        assert sorted(ids) == list(range(RECORDS - 1))
        assert sum(batch.real_tokens for batch, _, _ in epoch) == sum(expected)
    assert [batch.rows for batch, _, _ in epochs[0]] != [batch.rows for batch, _, _ in epochs[1]]
    assert steps[-1][0].progress == 2.0
    # in the middle of a late window, with other workers than before, and into the next epoch
    at = len(epochs[0]) - 3
    resumed = make(sources[kind], tokenizer, workers=2)
    assert resumed.load_state_dict(steps[at][2]) == []
    again = [(resumed.next_batch(), json.loads(json.dumps(resumed.state_dict()))) for _ in range(5)]
    resumed.close()
    assert again == [(batch, state) for batch, _, state in steps[at + 1 : at + 6]]
    if kind == "saved":
        assert any(state["reader"] for _, _, state in steps)


def test_prefetching_reads_the_same_and_ends_its_workers(sources, tokenizer_of):
    tokenizer = tokenizer_of("chatml")
    walked = make(sources["lines"], tokenizer)
    with Prefetcher(make(sources["lines"], tokenizer), rank=1, world=2, micro_rows=2) as prefetcher:
        for _ in range(6):
            got, batch = next(prefetcher), walked.next_batch()
            assert got.batch == batch
            assert got.state_after == walked.state_dict()
    walked.close()
    assert multiprocessing.active_children() == []


def test_a_changed_source_is_refused(sources, tokenizer_of, tmp_path):
    state = make(sources["lines"], tokenizer_of("chatml")).state_dict()
    with pytest.raises(DataError, match=r"does not match .* another output_dir"):
        make(sources["lines"], tokenizer_of("llama3")).load_state_dict(state)
    with pytest.raises(DataError, match="checkpoint's position"):
        make(sources["saved"], tokenizer_of("chatml")).load_state_dict(state)


def test_a_broken_record_is_named_when_it_is_read(tmp_path, tokenizer_of):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' * 40 + '{"prompt": \n')
    stream = make(str(path), tokenizer_of("chatml"))
    with pytest.raises(DataError, match=r"a\.jsonl line 41"):
        walk(stream, 1)
    stream.close()


def test_a_live_source_is_the_only_source_and_needs_max_steps():
    live = {"path": "a.jsonl", "live": True}
    with pytest.raises(ValueError, match="must be the only source"):
        DataConfig(train=[live, "b.jsonl"])
    with pytest.raises(ValueError, match="cannot be live"):
        DataConfig(train=["a.jsonl"], eval=[live])
    with pytest.raises(ValueError, match=r"optim\.max_steps"):
        RunConfig(model={"path": "tiny-llama"}, data={"train": [live]}, output_dir="out")
