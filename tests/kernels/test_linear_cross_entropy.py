"""linear_cross_entropy and linear_log_probs against fp64 truth, with full logits as the tolerance; memory; edge
cases."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from ft_dist_kernels import sizes
from ft_dist_kernels.cross_entropy import chunks
from ft_dist_kernels.cross_entropy.op import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
    linear_log_probs,
    linear_log_probs_reference,
)
from ft_dist_kernels.cross_entropy.types import Head, Options
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests.kernels.parity import BACKEND_DTYPES, BACKENDS, check_backward_twice, check_parity

UPSTREAM = (torch.tensor(0.37),)
SHAPES = [(18, 32, 256), (13, 17, 97), (1, 8, 11)]
TENSORS = ("hidden", "weight", "bias", "lora_a", "lora_b", "lora_hidden", "token_weights")


def make_inputs(shape, dtype, *, ignored=0.4, extras=(), seed=0):
    rows, width, vocabulary = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size, scale=1.0):
        return (torch.randn(*size, generator=generator) * scale).to(dtype)

    labels = torch.randint(vocabulary, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < ignored] = -100
    every = {
        "bias": lambda: normal(vocabulary),
        "lora_a": lambda: normal(4, width, scale=0.3),
        "lora_b": lambda: normal(vocabulary, 4, scale=0.3),
        "lora_hidden": lambda: normal(rows, width),
        "token_weights": lambda: torch.rand(rows, generator=generator) * 2,
    }
    inputs = {"hidden": normal(rows, width), "weight": normal(vocabulary, width, scale=0.4), "labels": labels}
    return inputs | {name: every[name]() for name in extras}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks and several widened tiles even at test shapes."""
    monkeypatch.setattr(sizes, "CPU_LOGITS_BYTES", 12 * 301 * 4)
    monkeypatch.setattr(sizes, "CPU_CHUNK_ROWS", (5, 12))
    monkeypatch.setattr(sizes, "WIDENED_TILE_BYTES", 1)


def by_token(**options):
    """The outputs of every single row: the terms of the sums."""
    per_row = ("hidden", "labels", "lora_hidden", "token_weights")

    def terms(labels, **tensors):
        rows = []
        for row in range(labels.numel()):
            one = {k: v[row : row + 1] if k in per_row else v for k, v in {**tensors, "labels": labels}.items()}
            rows.append(linear_cross_entropy_reference(**one, **options))
        return tuple(torch.stack(outputs) for outputs in zip(*rows, strict=True))

    return terms


OPTIONS = {
    "plain": ({}, ()),
    "token-weights": ({}, ("token_weights",)),
    "softcap-scale-bias": ({"softcap": 3.0, "logit_scale": 0.6}, ("bias",)),
    "lora": ({"lora_scale": 1.7}, ("lora_a", "lora_b")),
    "lora-dropout": ({"lora_scale": 0.5, "softcap": 5.0}, ("lora_a", "lora_b", "lora_hidden", "token_weights")),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
def test_loss_parity(backend, dtype, name):
    options, extras = OPTIONS[name]
    inputs = make_inputs((23, 96, 301), dtype, extras=extras)
    check_parity(
        lambda **kw: linear_cross_entropy(**kw, **options, backend=backend),
        lambda **kw: linear_cross_entropy_reference(**kw, **options),
        inputs,
        upstream=UPSTREAM,
        frozen=("token_weights",),
        terms=by_token(**options),
    )


@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.0], ids=["none-ignored", "some-ignored", "all-ignored"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
def test_loss_shapes(backend, dtype, shape, ignored):
    check_parity(
        lambda **kw: linear_cross_entropy(**kw, backend=backend),
        linear_cross_entropy_reference,
        make_inputs(shape, dtype, ignored=ignored),
        upstream=UPSTREAM,
        terms=by_token(),
    )


@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.0], ids=["none-ignored", "some-ignored", "all-ignored"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_given_rows_give_the_same_bits_without_a_search(backend, ignored):
    results = []
    for known in (False, True):
        inputs = make_inputs((23, 96, 301), torch.float32, ignored=ignored)
        tensors = {name: tensor.requires_grad_() for name, tensor in inputs.items() if tensor.is_floating_point()}
        rows = (inputs["labels"] != -100).nonzero().view(-1) if known else None
        with Operators() as operators:
            out = linear_cross_entropy(**tensors, labels=inputs["labels"], rows=rows, backend=backend)
        assert ("nonzero" in operators.names) != known
        out.loss.backward()
        results.append([*out, *(tensor.grad for tensor in tensors.values())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class Operators(TorchDispatchMode):
    """The names of the operators that run under it."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["plain", "softcap-scale-bias", "lora-dropout"])
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
def test_log_probs_parity(backend, dtype, name):
    options, extras = OPTIONS[name]
    inputs = make_inputs((23, 96, 301), dtype, extras=tuple(x for x in extras if x != "token_weights"))
    check_parity(
        lambda **kw: (linear_log_probs(**kw, **options, backend=backend),),
        lambda **kw: (linear_log_probs_reference(**kw, **options),),
        inputs,
        upstream=(torch.randn(23, generator=torch.Generator().manual_seed(1)),),
    )


@given(
    rows=st.integers(1, 40), width=st.integers(1, 33), vocabulary=st.integers(2, 120), seed=st.integers(0, 99),
    softcap=st.sampled_from([None, 2.0]),
)  # fmt: skip
@settings(max_examples=20, deadline=None)
def test_loss_any_shape(rows, width, vocabulary, seed, softcap):
    options = {"softcap": softcap}
    check_parity(
        lambda **kw: linear_cross_entropy(**kw, **options),
        lambda **kw: linear_cross_entropy_reference(**kw, **options),
        make_inputs((rows, width, vocabulary), torch.float32, extras=("bias",), seed=seed),
        upstream=UPSTREAM,
        terms=by_token(**options),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [0, 5], ids=["zero-rows", "all-ignored"])
def test_no_labels(backend, rows):
    inputs = make_inputs((rows, 8, 33), torch.float32, ignored=2.0, extras=("bias", "lora_a", "lora_b"))
    tensors = {name: inputs[name].requires_grad_() for name in TENSORS if name in inputs}
    out = linear_cross_entropy(**tensors, labels=inputs["labels"], backend=backend)
    out.loss.backward()
    assert (out.loss.item(), out.nll.item(), out.tokens.item(), out.correct.item()) == (0, 0, 0, 0)
    for name, tensor in tensors.items():
        assert tensor.grad is not None, name
        assert tensor.grad.shape == tensor.shape
        assert not tensor.grad.any(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_shape_and_strides(backend):
    """(B, S) labels over a hidden state that is a transposed view."""
    inputs = make_inputs((24, 16, 50), torch.float32)
    inputs["hidden"] = inputs["hidden"].view(4, 6, 16).transpose(0, 1)
    inputs["labels"] = inputs["labels"].view(4, 6).T
    inputs["weight"] = inputs["weight"].T.contiguous().T
    check_parity(
        lambda **kw: linear_cross_entropy(**kw, backend=backend),
        linear_cross_entropy_reference,
        inputs,
        upstream=UPSTREAM,
        terms=by_token(),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_head_skips_its_gradient(backend, monkeypatch):
    made = []
    add_product = chunks.add_product
    monkeypatch.setattr(chunks, "add_product", lambda *args: made.append(args) or add_product(*args))
    inputs = make_inputs((30, 16, 64), torch.float32)
    hidden = inputs["hidden"].requires_grad_()
    linear_cross_entropy(hidden, inputs["weight"], inputs["labels"], backend=backend).loss.backward()
    assert hidden.grad is not None
    assert {total.shape[1] for total, *_ in made} <= {16}
    assert all(total.shape[0] != 64 for total, *_ in made)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_is_computed_under_no_grad(backend, monkeypatch):
    monkeypatch.setattr(chunks, "_accumulate", None)
    inputs = make_inputs((30, 16, 64), torch.float32)
    expected = linear_cross_entropy_reference(**inputs)
    weight = inputs.pop("weight").requires_grad_()
    with torch.no_grad():
        out = linear_cross_entropy(**inputs, weight=weight, backend=backend)
    assert not out.loss.requires_grad
    torch.testing.assert_close(out.loss, expected.loss)
    assert out.correct.item() == expected.correct.item()


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_twice(backend):
    inputs = make_inputs((23, 96, 301), torch.float32, extras=("bias", "lora_a", "lora_b"))
    check_backward_twice(lambda **kw: linear_cross_entropy(**kw, backend=backend)[:1], inputs)
    check_backward_twice(lambda **kw: (linear_log_probs(**kw, backend=backend),), inputs)


def test_tied_embedding_sums_both_uses():
    torch.manual_seed(0)
    table, ids, labels = torch.randn(40, 16), torch.randint(40, (20,)), torch.randint(40, (20,))
    grads = []
    for loss in (linear_cross_entropy, linear_cross_entropy_reference):
        weight = table.clone().requires_grad_()
        loss(F.embedding(ids, weight), weight, labels)[0].backward()
        grads.append(weight.grad)
    torch.testing.assert_close(*grads)


def test_under_checkpoint_and_autocast():
    inputs = make_inputs((23, 96, 301), torch.float32)
    labels = inputs["labels"]
    grads = []
    for wrap in (lambda f, *a: f(*a), lambda f, *a: checkpoint(f, *a, use_reentrant=False)):
        hidden, weight = inputs["hidden"].clone().requires_grad_(), inputs["weight"].clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            wrap(lambda h, w: linear_cross_entropy(h, w, labels).loss, hidden, weight).backward()
        grads.append((hidden.grad, weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    half = {name: t.bfloat16() if t.is_floating_point() else t for name, t in inputs.items()}
    half["hidden"].requires_grad_()
    linear_cross_entropy(**half).loss.backward()
    assert torch.equal(half["hidden"].grad.float(), grads[0][0])


def test_under_compile():
    """Correct but not traced: the call breaks the graph and runs eagerly."""
    inputs = make_inputs((23, 96, 301), torch.float32)
    grads = []
    for wrap in (lambda f: f, lambda f: torch.compile(f, backend="eager")):
        hidden, weight = inputs["hidden"].clone().requires_grad_(), inputs["weight"].clone().requires_grad_()
        wrap(lambda h, w: linear_cross_entropy(h * 2, w, inputs["labels"]).loss / 3)(hidden, weight).backward()
        grads.append((hidden.grad, weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.interpreter
def test_triton_treats_a_wrong_label_safely():
    inputs = make_inputs((6, 8, 20), torch.float32, ignored=0.0)
    inputs["labels"][2], inputs["labels"][4] = 20, -7
    head = Head(inputs["weight"], options=Options(triton=True))
    tokens, grads = chunks.run_chunks(
        head, inputs["hidden"], None, None, inputs["labels"], None, chunks.Wanted(hidden=True)
    )
    assert tokens.loss.isnan().tolist() == [False, False, True, False, True, False]
    assert grads.hidden.isnan().all(1).tolist() == [False, False, True, False, True, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor([0, 99, 1])}, "label 99 is outside"),
        ({"labels": torch.tensor([0, -1, 1])}, "label -1 is outside"),
        ({"labels": torch.zeros(4, dtype=torch.long)}, "labels has shape"),
        ({"labels": torch.zeros(3)}, "labels are integers"),
        ({"weight": torch.zeros(5, 3)}, "with one H"),
        ({"weight": torch.zeros(5, 4, dtype=torch.bfloat16)}, "must agree"),
        ({"hidden": torch.zeros(3, 4, dtype=torch.float64)}, "fp32, bf16 or fp16"),
        ({"bias": torch.zeros(4)}, "bias has shape"),
        ({"lora_a": torch.zeros(2, 4)}, "come together"),
        ({"lora_a": torch.zeros(2, 4), "lora_b": torch.zeros(5, 3)}, "lora_b has shape"),
        ({"lora_hidden": torch.zeros(3, 4)}, "lora_hidden has shape"),
        ({"token_weights": torch.zeros(2)}, "one weight per label"),
        ({"token_weights": torch.zeros(3, requires_grad=True)}, "carry no gradient"),
        ({"softcap": 0.0}, "softcap"),
        ({"logit_scale": float("inf")}, "logit_scale"),
        ({"backend": "cuda"}, "backend"),
        ({"rows": torch.tensor([[0, 2]])}, "rows is"),
        ({"rows": torch.tensor([0, 1])}, "label -100 is outside"),
    ],
)
def test_errors_name_the_value(change, message):
    arguments = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(5, 4), "labels": torch.tensor([0, -100, 4])}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**(arguments | change))


def test_chunk_rows_keep_a_gpu_busy():
    for count in (1, 1023, 1024, 1500, 5000, 8192, 100_000):
        for vocabulary in (1000, 49152, 128256, 262144):
            rows = sizes.chunk_rows(count, vocabulary, gpu=True, bytes_per_logit=2)
            assert min(count, 1024) <= rows <= 4096
    assert sizes.chunk_rows(8192, 128256, gpu=True, bytes_per_logit=2) == 1024
    assert sizes.chunk_rows(0, 100, gpu=True, bytes_per_logit=2) == 1


class PeakBytes(TorchDispatchMode):
    """The peak bytes of storages created under this mode, in addition to the inputs."""

    def __init__(self, *inputs):
        super().__init__()
        self.inputs = {tensor.untyped_storage()._cdata for tensor in inputs}
        self.alive, self.now, self.peak = {}, 0, 0

    def _release(self, key):
        self.now -= self.alive.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.alive and key not in self.inputs and storage.nbytes():
                    self.alive[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._release, key)
                    self.peak = max(self.peak, self.now)
        return result


@pytest.mark.parametrize("trained", [True, False])
def test_memory_is_a_tenth_of_full_logits(monkeypatch, trained):
    """The proportions of T=4096, V=49152, H=576 and of the real budget, at a sixteenth of the size."""
    monkeypatch.undo()
    monkeypatch.setattr(sizes, "CPU_LOGITS_BYTES", sizes.CPU_LOGITS_BYTES // 64)
    rows, width, vocabulary = 1024, 72, 6144
    hidden, weight = torch.randn(rows, width, requires_grad=True), torch.randn(vocabulary, width) * 0.05
    weight.requires_grad_(trained)
    labels = torch.randint(vocabulary, (rows,))
    peaks = []
    for loss in (
        lambda: linear_cross_entropy(hidden, weight, labels).loss,
        lambda: F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum"),
    ):
        hidden.grad = weight.grad = None
        with PeakBytes(hidden, weight, labels) as peak:
            loss().backward()
        peaks.append(peak.peak)
    assert peaks[0] <= peaks[1] / 10, f"{peaks[0] / 2**20:.1f} MiB against {peaks[1] / 2**20:.1f} MiB"
