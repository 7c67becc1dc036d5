"""`lora_linear` and its group form against fp64 truth and PEFT's own modules."""

import copy

import pytest
import torch
from ft_dist_kernels.dropout.op import effective_p, keep_mask
from ft_dist_kernels.lora.op import LoraWeights, lora_linear, lora_linear_group, lora_linear_reference
from ft_dist_kernels.quantised.nf4 import dequantize_nf4_reference, quantize_nf4
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from tests.kernels.parity import BACKEND_DTYPES, BACKENDS, check_backward_twice, check_parity

SCALE = 0.7
SHAPES = [
    pytest.param((32, 64, 48, 16), id="aligned"),
    pytest.param((37, 41, 53, 7), id="prime"),
    pytest.param((70, 130, 150, 9), id="ragged"),
    pytest.param((1, 40, 24, 8), id="one row"),
    pytest.param((0, 40, 24, 8), id="empty"),
]


def tensors(shape, dtype, *, adapter_dtype=None, bias=True, seed=0):
    """x, weight, bias, lora_a and lora_b of (tokens, in, out, rank), scaled so that outputs are of order one."""
    tokens, inner, outer, rank = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size, std=1.0, to=dtype):
        return (torch.randn(size, generator=generator) * std).to(to)

    return {
        "x": normal(tokens, inner),
        "weight": normal(outer, inner, std=inner**-0.5),
        "bias": normal(outer) if bias else None,
        "lora_a": normal(rank, inner, std=inner**-0.5, to=adapter_dtype or dtype),
        "lora_b": normal(outer, rank, std=rank**-0.5, to=adapter_dtype or dtype),
    }


def upstream(shape, seed=1):
    return torch.randn(shape[0], shape[2], generator=torch.Generator().manual_seed(seed)) * 1.7


def eager(x, weight, bias, lora_a, lora_b, p=0.0, seed=0):
    """PEFT's form for any mix of dtypes: the adapter's product in the adapter's dtype."""
    base = torch.nn.functional.linear(x, weight, bias)
    wide = x.to(lora_a.dtype)
    zero = torch.zeros_like(weight, dtype=wide.dtype)
    delta = lora_linear_reference(wide, zero, lora_a, lora_b, scale=SCALE, dropout_p=p, dropout_seed=seed)
    return ((base + delta).to(x.dtype),)


def ours(backend, p=0.0, seed=0):
    def call(x, weight, bias, lora_a, lora_b):
        y = lora_linear(
            x, weight, lora_a, lora_b, bias=bias, scale=SCALE, dropout_p=p, dropout_seed=seed, backend=backend
        )
        return (y,)

    return call


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend, dtype", BACKEND_DTYPES)
def test_every_gradient(backend, dtype, shape, p):
    inputs = tensors(shape, dtype)
    check_parity(
        ours(backend, p, 11), lambda **kw: eager(**kw, p=p, seed=11), inputs, upstream=(upstream(shape).to(dtype),)
    )


@pytest.mark.parametrize("frozen", [("weight", "bias"), ("weight", "bias", "x"), ("lora_a",), ("lora_b", "x")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_parameters(backend, frozen):
    shape = (19, 24, 40, 4)
    inputs = tensors(shape, torch.float32)
    check_parity(
        ours(backend, 0.2, 3),
        lambda **kw: eager(**kw, p=0.2, seed=3),
        inputs,
        upstream=(upstream(shape),),
        frozen=frozen,
    )


@pytest.mark.parametrize(
    "backend, dtype",
    [
        ("torch", torch.bfloat16),
        ("torch", torch.float16),
        pytest.param("triton", torch.float16, marks=pytest.mark.interpreter),
    ],
)
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_adapters_in_fp32_over_half_precision(backend, dtype, p):
    """With half precision's tolerance: A and B are rounded for compute, their gradients are not."""
    shape = (33, 48, 56, 8)
    inputs = tensors(shape, dtype, adapter_dtype=torch.float32)

    def rounded(**kw):
        kw["lora_a"], kw["lora_b"] = kw["lora_a"].to(kw["x"].dtype), kw["lora_b"].to(kw["x"].dtype)
        return eager(**kw, p=p, seed=2)

    check_parity(ours(backend, p, 2), rounded, inputs, upstream=(upstream(shape).to(dtype),))
    leaf = inputs["lora_a"].clone().requires_grad_()
    lora_linear(inputs["x"], inputs["weight"], leaf, inputs["lora_b"], backend=backend).float().sum().backward()
    assert leaf.grad.dtype is torch.float32
    assert not torch.equal(leaf.grad, leaf.grad.to(dtype).float()), "accumulated in half precision"


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend):
    shape = (12, 24, 40, 4)
    inputs = tensors(shape, torch.float32)
    inputs["x"] = torch.randn(24, 30).t()[3:15, :].t().t()[:, :24]
    inputs["weight"] = torch.randn(24, 40).t()
    inputs["lora_a"] = torch.randn(24, 4).t()
    inputs["lora_b"] = torch.randn(40, 8)[:, ::2]
    check_parity(
        ours(backend, 0.1, 4),
        lambda **kw: eager(**kw, p=0.1, seed=4),
        inputs,
        upstream=(upstream(shape).t().contiguous().t(),),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_upstream_gradient_of_a_sum_has_stride_zero(backend):
    inputs = {k: v.requires_grad_() for k, v in tensors((9, 16, 24, 4), torch.float32).items()}
    ours(backend)(**inputs)[0].sum().backward()
    expected = {k: v.detach().clone().requires_grad_() for k, v in inputs.items()}
    eager(**expected)[0].sum().backward()
    for name, tensor in inputs.items():
        torch.testing.assert_close(tensor.grad, expected[name].grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_shape_and_retained_graph(backend):
    inputs = tensors((24, 16, 24, 4), torch.float32)
    inputs["x"] = inputs["x"].view(2, 3, 4, 16)
    assert ours(backend)(**inputs)[0].shape == (2, 3, 4, 24)
    check_backward_twice(ours(backend, 0.2, 9), inputs)


def group(shape, dtype, ranks, outs, ps, names=("a", "b", "c", "d")):
    """Inputs of a group as one dict, and a builder of LoraWeights from it."""
    tokens, inner = shape
    inputs = {"x": tensors((tokens, inner, 4, 4), dtype)["x"]}
    for index, (rank, out) in enumerate(zip(ranks, outs, strict=True)):
        member = tensors((tokens, inner, out, rank), dtype, bias=index % 2 == 0, seed=20 + index)
        inputs |= {f"{names[index]}_{key}": value for key, value in member.items() if key != "x"}

    def weights(kw):
        return [
            LoraWeights(
                kw[f"{n}_weight"], kw[f"{n}_bias"], kw[f"{n}_lora_a"], kw[f"{n}_lora_b"], SCALE + i, ps[i], 50 + i
            )
            for i, n in enumerate(names[: len(ranks)])
        ]

    return inputs, weights


@pytest.mark.parametrize("ps", [(0.0, 0.0, 0.0), (0.1, 0.4, 0.0)])
@pytest.mark.parametrize("backend, dtype", BACKEND_DTYPES)
def test_group_shares_x(backend, dtype, ps):
    inputs, weights = group((35, 40), dtype, (8, 8, 5), (48, 24, 17), ps)
    grads = tuple(torch.randn(35, out).to(dtype) for out in (48, 24, 17))

    def eager_group(**kw):
        outputs = []
        for w in weights(kw):
            base = torch.nn.functional.linear(kw["x"], w.weight, w.bias)
            zero = torch.zeros_like(w.weight)
            delta = lora_linear_reference(
                kw["x"], zero, w.lora_a, w.lora_b, scale=w.scale, dropout_p=w.dropout_p, dropout_seed=w.seed
            )
            outputs.append(base + delta)
        return tuple(outputs)

    def our_group(**kw):
        return tuple(lora_linear_group(kw["x"], weights(kw), backend=backend))

    check_parity(our_group, eager_group, inputs, upstream=grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_group_with_an_unused_output_that_needs_several_launches(backend):
    inputs, weights = group((9, 16), torch.float32, (4, 4, 4, 4), (12, 8, 8, 20), (0.0, 0.2, 0.0, 0.5))

    def grads(call):
        leaves = {k: v.clone().requires_grad_() for k, v in inputs.items() if v is not None}
        leaves |= {k: None for k, v in inputs.items() if v is None}
        outputs = call(leaves)
        (outputs[0].square().sum() + outputs[3].sum()).backward()
        return {k: v.grad for k, v in leaves.items() if v is not None}

    def one_by_one(kw):
        return [
            lora_linear_reference(
                kw["x"], w[0], *w[2:4], bias=w.bias, scale=w.scale, dropout_p=w.dropout_p, dropout_seed=w.seed
            )
            for w in weights(kw)
        ]

    got, expected = grads(lambda kw: lora_linear_group(kw["x"], weights(kw), backend=backend)), grads(one_by_one)
    for name, grad in expected.items():
        if grad is None:
            assert got[name] is None or not got[name].any(), name
        else:
            torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_is_the_documented_mask_in_both_directions(backend):
    """With W = 0, A = I and B = I the output is the dropped x and the gradient of x the dropped upstream."""
    size, p, seed = 24, 0.4, 1234
    x = torch.randn(31, size).abs().add_(0.5).requires_grad_()
    eye = torch.eye(size)
    y = lora_linear(x, torch.zeros(size, size), eye, eye, dropout_p=p, dropout_seed=seed, backend=backend)
    mask = keep_mask(31, size, p=p, seed=seed)
    assert torch.equal(y.detach() != 0, mask)
    torch.testing.assert_close(y.detach(), x.detach() * mask / (1 - effective_p(p)))
    y.backward(torch.ones_like(y))
    assert torch.equal(x.grad != 0, mask)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_x_and_s_are_saved_per_token(backend):
    tokens, rank = 29, 6
    inputs = tensors((tokens, 16, 24, rank), torch.float32)
    inputs = {k: v.requires_grad_() for k, v in inputs.items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ours(backend, 0.3, 8)(**inputs)
    of_tokens = sorted(t.shape[1] for t in saved if t.shape[0] == tokens)
    assert of_tokens == [rank, 16]
    parameters = {inputs[name].data_ptr() for name in ("weight", "lora_a", "lora_b")}
    assert {t.data_ptr() for t in saved if t.shape[0] != tokens} == parameters


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_weight_released_after_forward_and_gathered_before_backward(backend):
    """As ZeRO-3 does: frees a parameter's storage after forward and gathers it at another address before backward."""
    inputs = tensors((9, 16, 24, 4), torch.float32)
    x = inputs["x"].requires_grad_()
    weight, a, b = (torch.nn.Parameter(inputs[name]) for name in ("weight", "lora_a", "lora_b"))
    expected = torch.autograd.grad(lora_linear(x, weight, a, b, backend=backend).square().sum(), [x, a, b])
    loss = lora_linear(x, weight, a, b, backend=backend).square().sum()
    whole = {p: p.data.clone() for p in (weight, a, b)}
    for parameter in whole:
        parameter.data = torch.empty(0)
    for parameter, data in whole.items():
        parameter.data = data
    for got, want in zip(torch.autograd.grad(loss, [x, a, b]), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_activation_checkpointing_draws_the_same_mask(backend):
    inputs = tensors((21, 16, 24, 4), torch.float32)
    leaves = [inputs[name].requires_grad_() for name in ("x", "lora_a", "lora_b")]

    def call(x, a, b):
        y = lora_linear(x, inputs["weight"], a, b, dropout_p=0.5, backend=backend)
        return lora_linear(y[:, :16], inputs["weight"], a, b, dropout_p=0.5, backend=backend)

    torch.manual_seed(3)
    expected = torch.autograd.grad(call(*leaves).square().sum(), leaves)
    torch.manual_seed(3)
    got = torch.autograd.grad(checkpoint(call, *leaves, use_reentrant=False).square().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nf4_weight(backend):
    inputs = tensors((13, 72, 40, 8), torch.float32)
    packed = quantize_nf4(inputs["weight"])
    dense = dequantize_nf4_reference(packed, torch.float32)
    leaves = [inputs[name].requires_grad_() for name in ("x", "lora_a", "lora_b")]
    y = lora_linear(leaves[0], packed, *leaves[1:], bias=inputs["bias"], dropout_p=0.1, dropout_seed=1, backend=backend)
    z = lora_linear(leaves[0], dense, *leaves[1:], bias=inputs["bias"], dropout_p=0.1, dropout_seed=1, backend=backend)
    torch.testing.assert_close(y, z)
    for got, want in zip(
        torch.autograd.grad(y.square().sum(), leaves), torch.autograd.grad(z.square().sum(), leaves), strict=True
    ):
        torch.testing.assert_close(got, want)


@settings(max_examples=12, deadline=None)
@given(
    tokens=st.integers(0, 70),
    inner=st.integers(1, 70),
    outer=st.integers(1, 70),
    rank=st.integers(1, 20),
    p=st.sampled_from([0.0, 0.15]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_shape(tokens, inner, outer, rank, p, dtype):
    inputs = tensors((tokens, inner, outer, rank), dtype)
    grad = upstream((tokens, inner, outer, rank)).to(dtype)
    check_parity(ours("torch", p, 6), lambda **kw: eager(**kw, p=p, seed=6), inputs, upstream=(grad,))


@pytest.mark.interpreter
@settings(max_examples=6, deadline=None)
@given(tokens=st.integers(1, 70), inner=st.integers(1, 140), outer=st.integers(1, 140), rank=st.integers(1, 40))
def test_any_shape_in_triton(tokens, inner, outer, rank):
    inputs = tensors((tokens, inner, outer, rank), torch.float32)
    grad = upstream((tokens, inner, outer, rank))
    check_parity(ours("triton", 0.2, 6), lambda **kw: eager(**kw, p=0.2, seed=6), inputs, upstream=(grad,))


def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_parameters():
    inputs = {k: v.requires_grad_() for k, v in tensors((9, 16, 24, 4), torch.float32).items()}
    with torch.autocast("cpu", torch.bfloat16):
        y = ours("torch")(**inputs)[0]
    assert y.dtype is torch.bfloat16
    y.float().sum().backward()
    assert all(tensor.grad.dtype is torch.float32 for tensor in inputs.values())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight": torch.zeros(0)}, "ZeRO-3"),
        ({"lora_b": torch.zeros(24, 5)}, r"lora_b \(24, 5\)"),
        ({"bias": torch.zeros(3)}, "bias has 3 elements"),
        ({"weight": torch.zeros(24, 16, dtype=torch.bfloat16)}, "torch.autocast"),
        ({"dropout_p": 1.0}, "dropout_p=1.0"),
    ],
)
def test_errors_name_the_value(change, message):
    arguments = tensors((9, 16, 24, 4), torch.float32) | {"dropout_p": 0.0} | change
    with pytest.raises(ValueError, match=message):
        lora_linear(**arguments)


def peft_layer(p, dora, bias, dtype=torch.float32):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(24, 40, bias=bias)).to(dtype)
    config = peft.LoraConfig(r=6, lora_alpha=9, lora_dropout=p, target_modules=["0"], use_dora=dora, use_rslora=True)
    layer = peft.get_peft_model(model, config).base_model.model[0]
    torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.3)
    if dora:
        with torch.no_grad():
            layer.lora_magnitude_vector["default"].weight.mul_(1.3)
    return layer


@pytest.mark.parametrize("trained_weight", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.35])
def test_peft_modules(p, dora, bias, trained_weight):
    """PEFT's own layer, its dropout replaced by our mask: outputs and every gradient."""
    layer = peft_layer(p, dora, bias)
    layer.base_layer.weight.requires_grad_(trained_weight)
    x = torch.randn(2, 11, 24)
    mine = copy.deepcopy(layer)
    if p:
        mask = keep_mask(22, 24, p=p, seed=77).view(2, 11, 24) / (1 - effective_p(p))

        class Fixed(torch.nn.Module):
            def forward(self, value):
                return value * mask

        layer.lora_dropout["default"] = Fixed()
    x_peft, x_ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    y_peft = layer(x_peft)
    y_ours = lora_linear(
        x_ours,
        mine.base_layer.weight,
        mine.lora_A["default"].weight,
        mine.lora_B["default"].weight,
        bias=mine.base_layer.bias,
        scale=mine.scaling["default"],
        dropout_p=p,
        dropout_seed=77,
        dora_magnitude=mine.lora_magnitude_vector["default"].weight if dora else None,
    )
    grad = torch.randn_like(y_peft)
    y_peft.backward(grad)
    y_ours.backward(grad.clone())
    close = {"rtol": 2e-5, "atol": 2e-5}
    torch.testing.assert_close(y_ours, y_peft, **close)
    torch.testing.assert_close(x_ours.grad, x_peft.grad, **close)
    theirs = dict(layer.named_parameters())
    for name, parameter in mine.named_parameters():
        assert (parameter.grad is None) == (theirs[name].grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, **close, msg=name)
