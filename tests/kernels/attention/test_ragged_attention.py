"""Attention over ragged segments: the layout, the gathering of shared keys, and the calls to PyTorch's kernels.

Flash kernels do not run on CPU. `Kernels` replaces PyTorch's operators, does exactly what they promise
(and no more: values outside every segment are NaN), and counts calls.
"""

import inspect
from types import SimpleNamespace

import pytest
import torch
from ft_dist_kernels.attention import ragged as module
from ft_dist_kernels.attention.op import segment_attention, segment_attention_reference
from ft_dist_kernels.attention.ragged import (
    attention_kernel,
    ragged_attention,
    ragged_attention_reference,
    sum_places,
    sum_places_reference,
)
from ft_dist_kernels.attention.ragged_segments import coarse, fine, lay_ragged, segments_for
from ft_dist_kernels.attention.segments import find_segments
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.kernels.attention.test_segment_attention import ROWS, SHARING, make_inputs, positions_of
from tests.kernels.parity import BACKEND_DTYPES, assert_no_further, check_parity, poisoned

SCALE = 0.25


def flattened(lists):
    return torch.tensor([token for tokens in lists for token in tokens]), torch.tensor([len(one) for one in lists])


class Kernels:
    """`_flash_attention_forward` and `_efficient_attention_forward` with their backward passes, on CPU."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, ...]] = []

    def attend(self, q, k, v, query_ends, key_ends, scale, left):
        """Query i of n sees key j of m where 0 <= i + m - n - j, and <= left unless that is negative."""
        y = torch.full_like(q, float("nan"))
        repeats = q.shape[1] // k.shape[1]
        for start, end, key_start, key_end in zip(
            query_ends, query_ends[1:], key_ends, key_ends[1:], strict=False
        ):  # fmt: skip
            keys, values = (x[key_start:key_end].repeat_interleave(repeats, 1) for x in (k, v))
            count = key_end - key_start
            distance = torch.arange(end - start)[:, None] + count - (end - start) - torch.arange(count)
            seen = (distance >= 0) & ((distance <= left) if left >= 0 else (distance == distance))
            scores = torch.einsum("qhd,khd->hqk", q[start:end], keys) * scale
            weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
            y[start:end] = torch.einsum("hqk,khd->qhd", weights, values)
        return y

    def gradients(self, dy, q, k, v, query_ends, key_ends, scale, left):
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            parts = self.attend(*leaves, query_ends, key_ends, scale, left)[: query_ends[-1]]
        dq, dk, dv = torch.autograd.grad(parts, leaves, dy[: query_ends[-1]])
        dk[key_ends[-1] :], dv[key_ends[-1] :] = float("nan"), float("nan")
        return dq, dk, dv

    def check(self, q, k, ends, longest):
        self.calls.append((len(q), len(k), len(ends[0]), *longest))
        for end, most in zip(ends, longest, strict=True):
            assert end.dtype == torch.int32
            assert end.is_contiguous()
            assert int(end.diff().max()) <= most

    def flash_forward(
        self, q, k, v, query_ends, key_ends, longest_q, longest_k, p, causal, debug, *, scale,
        window_size_left, window_size_right,
    ):  # fmt: skip
        self.check(q, k, (query_ends, key_ends), (longest_q, longest_k))
        assert (p, debug, window_size_right) == (0.0, False, 0)
        assert causal == (window_size_left < 0)
        y = self.attend(q, k, v, query_ends.tolist(), key_ends.tolist(), scale, window_size_left)
        return y, torch.zeros(q.shape[1], len(q)), torch.zeros(2), torch.zeros(()), None

    def flash_backward(
        self, dy, q, k, v, y, lse, query_ends, key_ends, longest_q, longest_k, p, causal, seed, offset, *, scale,
        window_size_left, window_size_right,
    ):  # fmt: skip
        assert torch._C._get_deterministic_algorithms()
        assert not torch._C._get_deterministic_algorithms_warn_only()
        assert not torch._C._get_deterministic_fill_uninitialized_memory()
        assert (lse.shape, seed.shape, y.shape) == ((q.shape[1], len(q)), (2,), q.shape)
        return self.gradients(dy, q, k, v, query_ends.tolist(), key_ends.tolist(), scale, window_size_left)

    def efficient_forward(
        self, q, k, v, bias, query_ends, key_ends, longest_q, longest_k, p, mask, lse, *, scale, window_size=0
    ):
        self.check(q[0], k[0], (query_ends, key_ends), (longest_q, longest_k))
        assert (len(q), bias, p, mask, lse) == (1, None, 0.0, 2, True)
        assert q.shape[2] == k.shape[2] == v.shape[2]
        assert longest_q <= q.shape[1]
        assert longest_k <= k.shape[1]
        y = self.attend(q[0], k[0], v[0], query_ends.tolist(), key_ends.tolist(), scale, window_size - 1)
        return y[None], torch.zeros(1), torch.zeros(()), torch.zeros(()), longest_q, longest_k

    def efficient_backward(
        self, dy, q, k, v, bias, y, query_ends, key_ends, longest_q, longest_k, lse, p, seed, offset, mask,
        bias_grad, *, scale, num_splits_key, window_size=0,
    ):  # fmt: skip
        assert (bias, p, mask, bias_grad, num_splits_key) == (None, 0.0, 2, False, 1)
        # with fewer queries than keys, its window starts elsewhere than the forward pass's
        assert not window_size or torch.equal(query_ends, key_ends)
        ends = query_ends.tolist(), key_ends.tolist()
        gradients = self.gradients(dy[0], q[0], k[0], v[0], *ends, scale, window_size - 1)
        return (*(grad[None] for grad in gradients), None)


@pytest.fixture(params=["flash", "efficient"])
def kernels(request, monkeypatch):
    stand_in = Kernels()
    for name in ("flash", "efficient"):
        for way in ("forward", "backward"):
            monkeypatch.setattr(torch.ops.aten, f"_{name}_attention_{way}", getattr(stand_in, f"{name}_{way}"))
    monkeypatch.setattr(module, "attention_kernel", lambda *_, **__: request.param)
    return stand_in


@pytest.mark.parametrize("window", [None, 4, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_parity_in_one_call(kernels, name, dtype, window):
    rows = ROWS[name]
    positions, inputs = positions_of(rows), make_inputs(rows, dtype)
    segments = segments_for("cuda", positions)
    upstream = torch.randn(inputs["q"].transpose(1, 2).shape, generator=torch.Generator().manual_seed(3))
    check_parity(
        lambda q, k, v: segment_attention(q, k, v, segments, scale=SCALE, window=window),
        lambda q, k, v: segment_attention_reference(q, k, v, positions, scale=SCALE, window=window),
        inputs,
        upstream=upstream.to(dtype).float(),
    )
    assert len(kernels.calls) == 2  # one call per run
    assert not torch._C._get_deterministic_algorithms()


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SHARING)
def test_segments_that_share_tokens(kernels, name, dtype, window):
    """As if each segment had its own copy: values, and the gradients' sums over all copies."""
    flat, lengths = flattened(SHARING[name])
    segments = lay_ragged(flat, lengths)
    tokens = int(flat.max()) + 1
    positions = torch.cat([torch.arange(length) for length in lengths.tolist()])[None]
    first = torch.tensor([flat.tolist().index(token) for token in range(tokens)])

    def truth(q, k, v):
        apart = [x[:, :, flat] for x in (q, k, v)]
        return segment_attention_reference(*apart, positions, scale=SCALE, window=window)[:, first]

    upstream = torch.randn(1, tokens, 4, 16, generator=torch.Generator().manual_seed(3))
    check_parity(
        lambda q, k, v: segment_attention(q, k, v, segments, scale=SCALE, window=window),
        truth,
        make_inputs([[tokens]], dtype),
        upstream=upstream.to(dtype).float(),
    )
    assert len(kernels.calls) == 2


def test_one_token(kernels):
    """The batch of a rank without rows."""
    inputs = {name: tensor.requires_grad_() for name, tensor in make_inputs([[1]], torch.float32).items()}
    y = segment_attention(**inputs, segments=segments_for("cuda", positions_of([[1]])), scale=SCALE)
    y.sum().backward()
    assert torch.equal(y[0, 0], inputs["v"][0, :, 0].repeat_interleave(2, 0))
    assert inputs["q"].grad.abs().max() < 1e-6


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=12), st.sampled_from([None, 2, 7, 40]))
def test_the_cpu_form_is_the_reference(lengths, window):
    positions, inputs = positions_of([lengths]), make_inputs([lengths], torch.float32, heads=2, kv_heads=1, width=4)
    y = segment_attention(**inputs, segments=segments_for("cuda", positions), scale=SCALE, window=window)
    torch.testing.assert_close(
        y, segment_attention_reference(**inputs, position_ids=positions, scale=SCALE, window=window)
    )


def test_tokens_must_be_in_the_order_of_their_segments():
    with pytest.raises(ValueError, match="order"):
        lay_ragged(torch.tensor([2, 0, 1]), torch.tensor([1, 2]))


def test_sizes_are_rounded_up_coarsely():
    assert [coarse(count) for count in (1, 2, 3, 20, 32, 33)] == [1, 2, 4, 20 + 12, 32, 64]
    assert [fine(count) for count in (1, 16, 17, 1000, 4097)] == [16, 16, 32, 1024, 4608]
    assert len({fine(count) for count in range(4096, 8193)}) == 9
    segments = lay_ragged(torch.arange(60), torch.tensor([7, 20, 33]))
    assert segments.query_ends.tolist() == [0, 7, 27, 60, 60]
    assert segments.key_ends is segments.query_ends
    assert (segments.longest_queries, segments.longest_keys) == (60, 60)


def test_segments_for_a_cpu_are_refused_on_other_devices():
    inputs = {name: tensor.to("meta") for name, tensor in make_inputs(ROWS["many"], torch.float32).items()}
    with pytest.raises(ValueError, match="segments for cpu cannot be used"):
        segment_attention(**inputs, segments=find_segments(positions_of(ROWS["many"])), scale=SCALE)


@pytest.mark.parametrize("name", ["flash_forward", "flash_backward", "efficient_forward", "efficient_backward"])
def test_the_stand_ins_have_the_signatures_of_pytorchs_operators(name):
    family, way = name.split("_")
    real = getattr(torch.ops.aten, f"_{family}_attention_{way}").default._schema.arguments
    ours = inspect.signature(getattr(Kernels(), name)).parameters.values()
    positional = [entry for entry in ours if entry.kind is not entry.KEYWORD_ONLY]
    assert len(positional) == sum(not entry.kwarg_only for entry in real)
    assert {entry.name for entry in ours if entry.kind is entry.KEYWORD_ONLY} <= {
        entry.name for entry in real if entry.kwarg_only
    }


@pytest.mark.parametrize("window", [None, 64])
def test_pytorchs_flash_operators_accept_the_call(window):
    """On tensors without memory."""
    segments = lay_ragged(torch.arange(256), torch.tensor([100, 156]))
    with FakeTensorMode(), torch.no_grad():
        # wider than our own backward pass supports
        q, k, v = (torch.empty(256, heads, 192, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2))
        segments = segments._changed(lambda x: torch.empty(x.shape, dtype=x.dtype, device="cuda"))
        context = SimpleNamespace(save_for_backward=lambda *tensors: vars(context).update(saved_tensors=tensors))
        y = module._Flash.forward(context, q, k, v, segments, SCALE, window, 0.0)
        assert (y.shape, y.device.type, y.dtype) == (q.shape, "cuda", q.dtype)
        gradients = module._Flash.backward(context, torch.empty_like(y))
        assert [grad.shape for grad in gradients[:3]] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize(
    ("dtype", "width", "capability", "expected"),
    [
        (torch.bfloat16, 128, (9, 0), "flash"),
        (torch.float16, 256, (8, 0), "flash"),
        (torch.float32, 64, (9, 0), "efficient"),
        (torch.bfloat16, 320, (9, 0), "efficient"),
        (torch.bfloat16, 36, (9, 0), "efficient"),
        (torch.float16, 64, (7, 5), "efficient"),
    ],
)
def test_which_kernel(monkeypatch, dtype, width, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(module, "_flash3_function", lambda: None)
    attention_kernel.cache_clear()
    assert attention_kernel(torch.device("cuda", 0), dtype, width) == expected
    attention_kernel.cache_clear()


@pytest.mark.parametrize("repeats", [True, False])
def test_flash_attention_3_must_give_the_same_bits_twice(monkeypatch, repeats):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(module, "_flash3_function", lambda: len)
    monkeypatch.setattr(module, "_repeats_its_bits", lambda *_: repeats)
    attention_kernel.cache_clear()
    device = torch.device("cuda", 0)
    assert attention_kernel(device, torch.bfloat16, 128) == ("flash3" if repeats else "flash")
    assert attention_kernel(device, torch.bfloat16, 256) == "flash"
    assert attention_kernel(device, torch.bfloat16, 128, dropout=True) == "flash"
    attention_kernel.cache_clear()


@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_bits_that_differ_are_noticed(monkeypatch, noise):
    def attend(q, k, v, *_, softmax_scale, **__):
        weight = 1 + noise * torch.rand(())
        return q * weight * softmax_scale + (k + v).repeat_interleave(4, 1)

    monkeypatch.setattr(module, "_flash3_function", lambda: attend)
    assert module._repeats_its_bits(torch.device("cpu"), torch.float32, 8) == (noise == 0)


@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
@pytest.mark.parametrize("shape", [(2, 16), (1, 1), (3, 700)])
def test_sums_over_places(backend, dtype, shape):
    flat, lengths = flattened(SHARING["a tree"])
    segments = lay_ragged(flat, lengths)
    x_KMD = torch.randn(len(segments.keys), *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    x_KMD[len(flat) :] = float("nan")
    sums = sum_places(x_KMD, segments, backend=backend)
    truth = torch.stack([x_KMD[: len(flat)][flat == token].double().sum(0) for token in range(int(flat.max()) + 1)])
    torch.testing.assert_close(sums.double(), truth, rtol=float(torch.finfo(dtype).eps), atol=1e-6)
    assert torch.equal(sums, sum_places_reference(x_KMD, segments.places, segments.place_ends))


LAYOUTS = {
    "blocks of keys and of queries": ([[*range(7)], [7], [*range(8, 158)], [*range(158, 165)]], None),
    "a window": ([[*range(150)], [*range(150, 160)]], 60),
    "shared": ([[*range(90)], [*range(60), *range(90, 180)], [*range(40), *range(180, 185)]], None),
    "shared, in a window": ([[*range(150)], [*range(140), *range(150, 250)]], 50),
}


@pytest.mark.interpreter
@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 16), (torch.float16, 24)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_our_backward_of_flash_attention(name, dtype, width):
    from ft_dist_kernels.attention.ragged_backward_kernels import launch_backward

    lists, window = LAYOUTS[name]
    segments, chance = lay_ragged(*flattened(lists)), torch.Generator().manual_seed(0)
    tokens, places = int(segments.query_ends[-1]), int(segments.key_ends[-1])
    q, dy = (torch.randn(tokens, 4, width, generator=chance).to(dtype) for _ in range(2))
    k, v = (torch.randn(tokens if segments.keys is None else len(segments.keys), 2, width, generator=chance).to(dtype)
            for _ in range(2))  # fmt: skip
    results = []
    for kind in (torch.float64, dtype):
        leaves = [x.to(kind).requires_grad_() for x in (q, k, v)]
        y = ragged_attention_reference(*leaves, segments, SCALE, window)
        results.append((y.detach().to(dtype), [x[:places] for x in torch.autograd.grad(y, leaves, dy.to(kind))]))
    (y, truths), (_, yardsticks) = results  # the flash forward pass rounds once, like the truth here
    lse = log_sums(q, k, segments, window)
    with poisoned():
        runs = [launch_backward(dy, q, k, v, y, lse, segments, scale=SCALE, window=window) for _ in range(2)]
    for ours, again, truth, eager, part in zip(*runs, truths, yardsticks, "qkv", strict=True):
        assert_no_further(ours[:places], eager, truth, f"gradient of {part}")
        assert torch.equal(ours[:places], again[:places])


def log_sums(q, k, segments, window):
    sums = torch.full((q.shape[1], len(q)), float("nan"))
    ends = segments.query_ends.tolist(), segments.key_ends.tolist()
    for start, end, key_start, key_end in zip(ends[0], ends[0][1:], ends[1], ends[1][1:], strict=False):
        keys = k[key_start:key_end].repeat_interleave(q.shape[1] // k.shape[1], 1).double()
        distance = torch.arange(end - start)[:, None] + len(keys) - (end - start) - torch.arange(len(keys))
        seen = (distance >= 0) & (distance < (window or len(keys)))
        scores = torch.einsum("qhd,khd->hqk", q[start:end].double(), keys) * SCALE
        sums[:, start:end] = scores.masked_fill(~seen, float("-inf")).logsumexp(-1).float()
    return sums


def test_attention_without_gradients_gathers_too():
    segments = lay_ragged(*flattened(SHARING["a system prompt"]))
    q, k, v = (torch.randn(10, heads, 8, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2))
    with torch.no_grad():
        assert ragged_attention(q, k, v, segments, scale=SCALE).isfinite().all()
