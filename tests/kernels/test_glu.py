"""swiglu and geglu against fp64 truth, as separate tensors and as halves of one tensor."""

import pytest
import torch
from ft_dist_kernels.glu.op import geglu, geglu_reference, swiglu, swiglu_reference
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.parity import BACKEND_DTYPES, BACKENDS, check_backward_twice, check_parity

KINDS = {
    "swiglu": (swiglu, swiglu_reference, {}),
    "geglu-tanh": (geglu, geglu_reference, {"approximate": "tanh"}),
    "geglu-erf": (geglu, geglu_reference, {"approximate": "none"}),
}
SHAPES = [(16, 256), (3, 5, 80), (7, 37), (1, 1), (0, 8)]


def make_inputs(shape, dtype, *, packed=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if packed:
        return {"gate": (torch.randn(*shape[:-1], 2 * shape[-1], generator=generator) * 3).to(dtype)}
    return {name: (torch.randn(shape, generator=generator) * 3).to(dtype) for name in ("gate", "up")}


def check(kind, backend, inputs, shape):
    ours, reference, options = KINDS[kind]
    dtype = inputs["gate"].dtype
    check_parity(
        lambda **kw: (ours(**kw, **options, backend=backend),),
        lambda **kw: (reference(**kw, **options),),
        inputs,
        upstream=(torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(dtype).float(),),
    )


@pytest.mark.parametrize("packed", [False, True], ids=["apart", "packed"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
def test_parity(backend, dtype, shape, kind, packed):
    check(kind, backend, make_inputs(shape, dtype, packed=packed), shape)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_strided_halves_and_large_values(kind, backend):
    """Halves of one tensor, and values where sigmoid and erf saturate."""
    gate, up = (torch.randn(4, 6, 96, generator=torch.Generator().manual_seed(1)) * 40).chunk(2, -1)
    check(kind, backend, {"gate": gate, "up": up.transpose(0, 1).contiguous().transpose(0, 1)}, (4, 6, 48))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_result_with_spare_columns(backend):
    inputs = {name: tensor.requires_grad_() for name, tensor in make_inputs((2, 7, 37), torch.float32).items()}
    plain, roomy = swiglu(**inputs, backend=backend), swiglu(**inputs, spare=11, backend=backend)
    assert roomy.stride() == (7 * 48, 48, 1)
    torch.testing.assert_close(roomy, plain)  # the spare columns move the vector boundaries on CPU
    upstream = torch.randn(plain.shape)
    torch.testing.assert_close(*(torch.autograd.grad(y, list(inputs.values()), upstream) for y in (plain, roomy)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_column_blocks(backend):
    check("swiglu", backend, make_inputs((3, 2500), torch.float32, packed=True), (3, 2500))


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_twice(backend):
    check_backward_twice(lambda **kw: (swiglu(**kw, backend=backend),), make_inputs((9, 40), torch.float32))
    check_backward_twice(lambda **kw: (geglu(**kw, backend=backend),), make_inputs((9, 40), torch.float32, packed=True))


@given(rows=st.integers(1, 70), width=st.integers(1, 300), seed=st.integers(0, 99), kind=st.sampled_from(list(KINDS)))
@settings(max_examples=20, deadline=None)
def test_any_shape(rows, width, seed, kind):
    check(kind, "torch", make_inputs((rows, width), torch.float32, seed=seed), (rows, width))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_equal_those_of_the_replaced_operators(dtype):
    inputs = make_inputs((40, 96), dtype)
    assert torch.equal(swiglu(**inputs), swiglu_reference(**inputs))
    assert torch.equal(geglu(**inputs), geglu_reference(**inputs))


def test_upstream_that_is_expanded_or_transposed():
    inputs = make_inputs((6, 10), torch.float32)
    grads = []
    for function in (swiglu, swiglu_reference):
        gate, up = (inputs[name].clone().requires_grad_() for name in ("gate", "up"))
        (function(gate, up).T @ torch.ones(6, 2)).sum().backward()
        grads.append((gate.grad, up.grad))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: swiglu(torch.zeros(2, 3)), "two equal halves"),
        (lambda: swiglu(torch.zeros(2, 3), torch.zeros(2, 4)), "must agree"),
        (lambda: swiglu(torch.zeros(2, 4, dtype=torch.float64)), "fp32, bf16 or fp16"),
        (lambda: geglu(torch.zeros(2, 4), approximate="erf"), "approximate"),
    ],
)
def test_errors_name_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()
