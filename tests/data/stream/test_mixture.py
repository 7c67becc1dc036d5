"""Sources share an epoch in exact proportion at every position, and keep their position when the mixture changes."""

import json
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ft_dist.data.stream.mixture import Mixture, MixtureSource, draws_before, samples_per_epoch
from ft_dist.data.stream.stream import DataStream
from ft_dist.errors import DataError
from tests.data.stores import Lengths

some = settings(max_examples=60, deadline=None)

SIZES = {"a": 60, "b": 45, "c": 30, "d": 11}


def make(weights: dict[str, float], *, window: int = 8, packing: bool = True, **options) -> DataStream:
    """A stream over some of the named sources."""
    sources = [MixtureSource(name, Lengths(SIZES[name], fingerprint=name), weight) for name, weight in weights.items()]
    return DataStream(
        sources, seed=3, global_rows=3, max_length=64, packing=packing, window=window, shuffle_samples=32, **options
    )


def named(stream: DataStream, ids: list[int]) -> list[tuple[str, int]]:
    """Ids as (source, index in it), which stay the same when the mixture changes."""
    number = np.searchsorted(stream.store.starts, ids, side="right") - 1
    return [(stream.mixture.sources[s].name, int(i - stream.store.starts[s])) for s, i in zip(number, ids, strict=True)]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6))
@some
def test_draws_are_those_of_sorted_keys(taken):
    """Webster's method by definition: all keys in order, as fractions, one at a time."""
    keys = sorted((Fraction(2 * k + 1, 2 * n), source) for source, n in enumerate(taken) for k in range(n))
    draws = [0] * len(taken)
    for position, (_, source) in enumerate(keys):
        assert draws_before(position, taken) == draws
        draws[source] += 1
    assert draws_before(sum(taken), taken) == taken


@given(st.lists(st.integers(1, 10**11), min_size=1, max_size=8), st.data())
@some
def test_every_source_has_its_share_at_every_position(taken, data):
    total = sum(taken)
    position = data.draw(st.integers(0, total - 1))
    here, following = draws_before(position, taken), draws_before(position + 1, taken)
    assert sum(here) == position
    assert sorted(after - before for before, after in zip(here, following, strict=True))[-2:] in ([1], [0, 1])
    # any divisor method is within sources - 1 of the ideal; Webster's rarely leaves one sample
    assert all(
        abs(draws - n * position / total) <= max(1, len(taken) - 1) for draws, n in zip(here, taken, strict=True)
    )


@given(st.lists(st.tuples(st.integers(1, 10**6), st.floats(0.1, 3)), min_size=1, max_size=6), st.floats(0.5, 20))
@some
def test_temperature_keeps_the_total(sizes_and_weights, temperature):
    sizes, weights = zip(*sizes_and_weights, strict=True)
    plain, mixed = samples_per_epoch(sizes, weights, 1.0), samples_per_epoch(sizes, weights, temperature)
    assert plain == [max(1, round(weight * size)) for size, weight in sizes_and_weights]
    assert 0 <= sum(mixed) - sum(plain) <= len(sizes)
    assert min(mixed) > 0
    parts = [(w * n) ** (1 / temperature) for n, w in sizes_and_weights]
    ideal = [sum(plain) * part / sum(parts) for part in parts]
    assert all(abs(n - share) <= 1 for n, share in zip(mixed, ideal, strict=True))


def test_high_temperature_levels_sources():
    assert samples_per_epoch([900, 100], [1.0, 1.0], 1e9) == [500, 500]
    assert samples_per_epoch([900, 100], [1.0, 1.0], 2.0) == [750, 250]


def test_windows_hold_the_proportion():
    sources = [MixtureSource("a", Lengths(6000, fingerprint="a")), MixtureSource("b", Lengths(2000, fingerprint="b"))]
    mixture = Mixture(sources, seed=0, temperature=1.0, shuffle_samples=2**20, window=80)
    assert mixture.windows == 100
    for window in range(100):
        ids = mixture.window_ids(0, window, [0, 0])
        assert len(ids) == 80
        assert np.count_nonzero(ids >= 6000) == 20
    assert np.abs(np.corrcoef(np.arange(80), ids >= 6000)[0, 1]) < 0.4


def test_large_sources_are_read_in_few_places():
    """A window's samples of a source above shuffle_samples come from one group of 16 blocks, or two."""
    mixture = Mixture(
        [MixtureSource("a", Lengths(10_000, fingerprint="a"))], seed=0, temperature=1.0, shuffle_samples=320, window=100
    )
    seen = []
    for window in range(mixture.windows):
        ids = mixture.window_ids(0, window, [0])
        assert len(np.unique(ids // 20)) <= 33
        seen += ids.tolist()
    assert sorted(seen) == list(range(10_000))
    assert abs(np.corrcoef(seen, np.arange(10_000))[0, 1]) < 0.1


@given(
    st.dictionaries(st.sampled_from("abcd"), st.sampled_from([0.5, 1.0, 2.0]), min_size=1),
    st.dictionaries(st.sampled_from("abcd"), st.sampled_from([0.5, 1.0, 2.0]), min_size=1),
    st.integers(1, 60),
    st.booleans(),
)
@some
def test_a_changed_mixture_continues_every_sources_draws(before, after, steps, packing):
    """The change keeps the draws of a source, and an epoch of the new mixture follows its weights."""
    old, new = make(before, packing=packing), make(after, packing=packing)
    seen: Counter[str] = Counter()
    for _ in range(steps):
        seen.update(name for name, _ in named(old, old.next_batch().sample_ids))
    state = json.loads(json.dumps(old.state_dict()))
    if not set(before) & set(after):
        with pytest.raises(DataError, match=r"samples differ from .* another output_dir"):
            new.load_state_dict(state)
        return
    changes = new.load_state_dict(state)
    assert bool(changes) == (before != after or list(before) != list(after))
    if not changes:
        return
    assert {entry["name"]: entry["drawn"] for entry in new.state_dict()["sources"]} == {
        name: seen[name] for name in after
    }
    epoch = new.epochs_done
    ids = [named(new, new.next_batch().sample_ids)]
    assert new.state_dict()["samples_seen"] == sum(seen.values()) + len(ids[0])
    while new.epochs_done == epoch:
        ids.append(named(new, new.next_batch().sample_ids))
    drawn = Counter(name for batch in ids for name, _ in batch)
    assert drawn == {name: max(1, round(weight * SIZES[name])) for name, weight in after.items()}
    assert new.total_steps(epoch + 1) == steps + len(ids)
    # resuming after the change is a plain seek again
    again = make(after, packing=packing)
    assert again.load_state_dict(json.loads(json.dumps(new.state_dict()))) == []
    assert [again.next_batch() for _ in range(5)] == [new.next_batch() for _ in range(5)]
    assert again.total_steps(epoch + 2) == new.total_steps(epoch + 2)


def test_a_source_added_at_an_epochs_end_changes_no_pass_over_the_others():
    old, new = make({"a": 1.0, "b": 1.0}), make({"a": 1.0, "b": 1.0, "c": 1.0})
    while old.epochs_done == 0:
        old.next_batch()
    assert new.load_state_dict(old.state_dict()) == ["c added: 30 samples per epoch"]
    ids = []
    while new.epochs_done == 1:
        ids += new.next_batch().sample_ids
    assert sorted(ids) == list(range(60 + 45 + 30))
    continued, unchanged = [], []
    while old.epochs_done == 1:
        unchanged += [one for one in named(old, old.next_batch().sample_ids) if one[0] == "a"]
    continued = [one for one in named(new, ids) if one[0] == "a"]
    assert sorted(continued) == sorted(unchanged)


def test_a_removed_source_that_returns_continues():
    first = make({"a": 1.0, "b": 1.0})
    for _ in range(5):
        first.next_batch()
    drawn = {entry["name"]: entry["drawn"] for entry in first.state_dict()["sources"]}
    without = make({"a": 1.0})
    assert without.load_state_dict(first.state_dict()) == [f"b removed after {drawn['b']} samples"]
    without.next_batch()
    back = make({"b": 1.0, "a": 1.0})
    assert back.load_state_dict(without.state_dict()) == ["b added: 45 samples per epoch"]
    assert back.state_dict()["sources"][0]["drawn"] == drawn["b"] > 0


def test_the_same_name_with_other_content_is_refused():
    state = make({"a": 1.0, "b": 1.0}).state_dict()
    changed = DataStream(
        [MixtureSource("a", Lengths(60, fingerprint="edited")), MixtureSource("b", Lengths(45, fingerprint="b"))],
        seed=3,
        global_rows=3,
        max_length=64,
        packing=True,
        window=8,
        shuffle_samples=32,
    )
    with pytest.raises(DataError, match=r"^a: its samples differ"):
        changed.load_state_dict(state)


def test_a_source_without_samples_is_named():
    with pytest.raises(DataError, match=r"^empty: no samples"):
        DataStream([MixtureSource("empty", Lengths(0))], seed=0, global_rows=1, max_length=8, packing=False)
