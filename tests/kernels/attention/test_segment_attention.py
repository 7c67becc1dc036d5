"""segment_attention against attention with a mask over whole rows, in fp64 truth and the eager form of each dtype."""

import pytest
import torch
from ft_dist_kernels.attention.op import segment_attention, segment_attention_reference
from ft_dist_kernels.attention.segments import find_segments, lay_segments
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.parity import check_parity

ROWS = {
    "one-sample": [[24], [24]],
    "many": [[5, 9, 2, 8], [24]],
    "ones": [[1] * 24, [23, 1]],
    "long-and-short": [[150, 30], [60, 120]],
    "prime": [[7, 13, 31, 50, 1, 1, 1], [101, 3]],
}


def positions_of(rows):
    return torch.tensor([[position for length in row for position in range(length)] for row in rows])


def make_inputs(rows, dtype, *, heads=4, kv_heads=2, width=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    batch, length = len(rows), sum(rows[0])

    def tensor(count):
        return torch.randn(batch, length, count, width, generator=generator).to(dtype).transpose(1, 2)

    return {"q": tensor(heads), "k": tensor(kv_heads), "v": tensor(kv_heads)}


def check(rows, dtype, *, window=None, **shape):
    positions, inputs = positions_of(rows), make_inputs(rows, dtype, **shape)
    segments = find_segments(positions)
    upstream = torch.randn(inputs["q"].transpose(1, 2).shape, generator=torch.Generator().manual_seed(3))
    check_parity(
        lambda q, k, v: segment_attention(q, k, v, segments, scale=0.25, window=window),
        lambda q, k, v: segment_attention_reference(q, k, v, positions, scale=0.25, window=window),
        inputs,
        upstream=upstream.to(dtype).float(),
    )


@pytest.mark.parametrize("window", [None, 4, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_parity(name, dtype, window):
    check(ROWS[name], dtype, window=window)


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(3, 3, 8), (9, 3, 64), (1, 1, 2)])
def test_heads(heads, kv_heads, width):
    check(ROWS["many"], torch.float32, heads=heads, kv_heads=kv_heads, width=width)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=12), st.sampled_from([None, 2, 7, 40]))
def test_any_lengths(lengths, window):
    # a token that sees only itself has no gradient over q, so the tolerance would be zero
    check([[3, *lengths]], torch.float32, window=window, heads=2, kv_heads=1, width=4)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=40))
def test_every_token_has_one_slot_and_padding_is_bounded(lengths):
    segments = find_segments(positions_of([lengths]))
    tokens = sum(lengths)
    assert torch.equal(segments.queries[segments.query_of], torch.arange(tokens))
    assert torch.equal(segments.queries, segments.keys)
    assert torch.equal(segments.query_of, segments.key_of)
    places = sum(count * longest for count, _, longest in segments.shapes)
    assert len(segments.queries) == places == tokens + len(segments.unread)
    assert all(count * longest <= 2 * tokens + 128 for count, _, longest in segments.shapes)
    assert len(segments.shapes) <= 7


def test_tokens_outside_a_segment_change_nothing():
    """Padding repeats a token: its value and gradient must not appear anywhere."""
    rows = [[40, 50, 33]]
    segments, inputs = find_segments(positions_of(rows)), make_inputs(rows, torch.float32)
    assert len(segments.unread) > 0
    for tensor in inputs.values():
        tensor.requires_grad_()
    y = segment_attention(**inputs, segments=segments, scale=0.25)
    y[:, 60].sum().backward()  # a token of the second sample
    for tensor in inputs.values():
        outside = torch.cat([tensor.grad[:, :, :40], tensor.grad[:, :, 61:]], 2)
        assert outside.abs().max() == 0
        assert tensor.grad[:, :, 40:61].abs().max() > 0


SHARING = {
    "a system prompt": [[0, 1, 2, 3, 4], [0, 1, 2, 5, 6, 7, 8], [0, 1, 2, 9]],
    "a tree": [[0, 1, 2], [0, 1, 3, 4], [0, 1, 3, 5, 6], [7, 8]],
    "all but one": [[*range(40)], [*range(39), 40], [*range(20), 41]],
}


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SHARING)
def test_segments_that_share_tokens(name, dtype, window):
    """As if each segment had its own copy: values, and the gradients' sums over all copies."""
    lists = SHARING[name]
    flat = torch.tensor([token for tokens in lists for token in tokens])
    lengths = torch.tensor([len(tokens) for tokens in lists])
    segments = lay_segments(flat, lengths)
    tokens = int(flat.max()) + 1
    positions = torch.cat([torch.arange(length) for length in lengths.tolist()])[None]
    first = torch.tensor([flat.tolist().index(token) for token in range(tokens)])

    def truth(q, k, v):
        apart = [x[:, :, flat] for x in (q, k, v)]
        return segment_attention_reference(*apart, positions, scale=0.25, window=window)[:, first]

    upstream = torch.randn(1, tokens, 4, 16, generator=torch.Generator().manual_seed(3))
    check_parity(
        lambda q, k, v: segment_attention(q, k, v, segments, scale=0.25, window=window),
        truth,
        make_inputs([[tokens]], dtype),
        upstream=upstream.to(dtype).float(),
    )


def test_a_shared_prefix_is_queried_once():
    beginning = [*range(30)]
    lists = [[*beginning, *range(first, first + 20)] for first in range(30, 190, 20)]
    tokens = [token for segment in lists for token in segment]
    segments = lay_segments(torch.tensor(tokens), torch.tensor([50] * 8))
    assert segments.shapes == ((8, 30, 50), (1, 0, 30))
    assert torch.equal(segments.queries.sort().values, torch.arange(190))
    assert len(segments.unread) == 0


def test_two_runs_give_the_same_bits():
    results = []
    for _ in range(2):
        inputs = {name: tensor.requires_grad_() for name, tensor in make_inputs(ROWS["prime"], torch.float32).items()}
        y = segment_attention(**inputs, segments=find_segments(positions_of(ROWS["prime"])), scale=0.25)
        y.square().sum().backward()
        results.append([y.detach(), *(tensor.grad for tensor in inputs.values())])
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))
