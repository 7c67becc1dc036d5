"""rms_norm in both forms, with and without residual and trained weight, against fp64 truth and transformers'
modules."""

import pytest
import torch
from ft_dist_kernels.rms_norm.op import rms_norm, rms_norm_reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from tests.kernels.parity import BACKEND_DTYPES, BACKENDS, check_backward_twice, check_parity

FORMS = {"llama": {}, "gemma": {"offset": 1.0, "cast_before_weight": False}}
SHAPES = [(32, 256), (7, 3, 96), (13, 37), (1, 1), (0, 16)]


def make_inputs(shape, dtype, *, residual=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = {name: torch.randn(shape, generator=generator).to(dtype) for name in ("x", "residual")[: 1 + residual]}
    return inputs | {"weight": torch.randn(shape[-1], generator=generator).to(dtype)}


def upstream(shape, count, seed=9):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator) for _ in range(count))


def as_tuple(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def check(backend, dtype, shape, form="llama", *, residual=False, frozen=(), inputs=None, seed=0):
    options = {"eps": 1e-5, **FORMS[form]}
    check_parity(
        lambda **kw: as_tuple(rms_norm(**kw, **options, backend=backend)),
        lambda **kw: as_tuple(rms_norm_reference(**kw, **options)),
        inputs or make_inputs(shape, dtype, residual=residual, seed=seed),
        upstream=tuple(grad.to(dtype).float() for grad in upstream(shape, 1 + residual)),
        frozen=frozen,
    )


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
def test_parity(backend, dtype, shape, form, residual):
    check(backend, dtype, shape, form, residual=residual)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
def test_rows_too_wide_for_registers(backend, dtype, form, monkeypatch):
    if backend == "triton":
        from ft_dist_kernels.rms_norm import kernels

        monkeypatch.setattr(kernels, "WHOLE_WIDTH", 64)
        monkeypatch.setattr(kernels, "LOOPED_BLOCK", 64)
        monkeypatch.setattr(kernels, "COLUMN_TILE", (4, 128))
    check(backend, dtype, (5, 150), form, residual=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_weight_gets_no_gradient(backend):
    check(backend, torch.float32, (13, 37), residual=True, frozen=("weight",))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend):
    inputs = make_inputs((6, 5, 48), torch.float32, residual=True)
    fused = torch.randn(6, 5, 96)
    inputs["x"], inputs["residual"] = fused[..., 48:], inputs["residual"].transpose(0, 1).contiguous().transpose(0, 1)
    check(backend, torch.float32, (6, 5, 48), residual=True, inputs=inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_x_passes_through(backend):
    """Its other use sends its gradient through the norm."""
    results = []
    for with_sum in (False, True):
        x, weight = (tensor.requires_grad_() for tensor in make_inputs((5, 24), torch.float32).values())
        y = rms_norm(x, weight, eps=1e-6, with_sum=with_sum, backend=backend)
        y, again = y if with_sum else (y, x)
        assert torch.equal(again, x)
        (y.sin() + again.cos()).sum().backward()
        results.append((x.grad, weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_result_with_spare_columns(backend, residual):
    inputs = make_inputs((2, 3, 37), torch.float32, residual=residual)
    inputs = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    plain, roomy = (as_tuple(rms_norm(**inputs, eps=1e-6, spare=n, backend=backend)) for n in (0, 11))
    assert roomy[0].stride() == (3 * 48, 48, 1)
    torch.testing.assert_close(plain, roomy)  # the spare columns move the vector boundaries on CPU
    upstream = [torch.randn(output.shape) for output in plain]
    torch.testing.assert_close(
        *(torch.autograd.grad(outputs, list(inputs.values()), upstream) for outputs in (plain, roomy))
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_of_two_outputs_used(backend):
    """Only y, or only the sum, reaches the loss."""
    for used in (0, 1):
        grads = []
        for function in (lambda **kw: rms_norm(**kw, backend=backend), rms_norm_reference):
            inputs = {k: v.requires_grad_() for k, v in make_inputs((5, 24), torch.float32, residual=True).items()}
            function(**inputs, eps=1e-6)[used].square().sum().backward()
            grads.append([torch.zeros(24) if v.grad is None else v.grad for v in inputs.values()])
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_twice(backend):
    check_backward_twice(lambda **kw: (rms_norm(**kw, eps=1e-6, backend=backend),), make_inputs((9, 40), torch.float32))


@given(rows=st.integers(1, 70), width=st.integers(1, 300), seed=st.integers(0, 99), form=st.sampled_from(list(FORMS)))
@settings(max_examples=20, deadline=None)
def test_any_shape(rows, width, seed, form):
    check("torch", torch.float32, (rows, width), form, residual=True, seed=seed)


def test_the_bits_equal_those_of_transformers_modules():
    """In fp32 and bf16 the forward pass equals the replaced modules bit for bit."""
    gemma = pytest.importorskip("transformers.models.gemma2.modeling_gemma2")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    for dtype in (torch.float32, torch.bfloat16):
        for module, form in ((llama.LlamaRMSNorm(96, eps=1e-6), "llama"), (gemma.Gemma2RMSNorm(96, eps=1e-6), "gemma")):
            module.to(dtype).weight.data.normal_()
            x = torch.randn(50, 96).to(dtype)
            assert torch.equal(rms_norm(x, module.weight, eps=1e-6, **FORMS[form]), module(x))


def test_under_checkpoint():
    inputs = make_inputs((20, 64), torch.float32, residual=True)
    grads = []
    for wrap in (lambda f, *a: f(*a), lambda f, *a: checkpoint(f, *a, use_reentrant=False)):
        x, residual, weight = (inputs[k].clone().requires_grad_() for k in ("x", "residual", "weight"))
        y, total = wrap(lambda a, b, c: rms_norm(a, c, eps=1e-6, residual=b), x, residual, weight)
        (y.sin() + total).sum().backward()
        grads.append((x.grad, residual.grad, weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(3)}, "weight is"),
        ({"x": torch.zeros(2, 4, dtype=torch.int32)}, "fp32, bf16 or fp16"),
        ({"residual": torch.zeros(2, 4, dtype=torch.bfloat16)}, "must agree"),
        ({"eps": -1.0}, "eps"),
    ],
)
def test_errors_name_the_value(change, message):
    with pytest.raises(ValueError, match=message):
        rms_norm(**({"x": torch.zeros(2, 4), "weight": torch.zeros(4), "eps": 1e-6} | change))
