"""`lora_linear_extended` against fp64 truth, against separate members, and against its own rules."""

import pytest
import torch
from ft_dist_kernels.lora.extended import ExtendedWeight, extended_spare, lora_linear_extended, suits_extended
from ft_dist_kernels.lora.op import LoraWeights, lora_linear_group, lora_linear_reference
from ft_dist_kernels.quantised.nf4 import quantize_nf4
from torch.utils.checkpoint import checkpoint

from tests.kernels.parity import BACKEND_DTYPES, BACKENDS, check_backward_twice, check_parity

SCALE = 0.7
# tokens, inputs, outputs and ranks of the members
GROUPS = [
    pytest.param((32, 64, (48, 16, 16), (16, 16, 16)), id="aligned"),
    pytest.param((37, 48, (140, 24, 7), (8, 5, 1)), id="ragged"),
    pytest.param((1, 40, (24, 33), (4, 4)), id="one row"),
    pytest.param((8, 40, (24,), (1,)), id="rank 1"),
    pytest.param((0, 40, (24, 16), (4, 4)), id="empty"),
]


def inputs_of(group, dtype, bias=True):
    """x with spare columns, and all tensors of every member, by name."""
    tokens, inner, outs, ranks = group
    generator = torch.Generator().manual_seed(0)

    def normal(*size, std=1.0):
        return (torch.randn(size, generator=generator) * std).to(dtype)

    inputs = {"x": normal(tokens, inner + extended_spare(ranks))[:, :inner]}
    for i, (out, rank) in enumerate(zip(outs, ranks, strict=True)):
        inputs |= {f"w{i}": normal(out, inner, std=inner**-0.5), f"bias{i}": normal(out) if bias and i != 1 else None}
        inputs |= {f"a{i}": normal(rank, inner, std=inner**-0.5), f"b{i}": normal(out, rank, std=rank**-0.5)}
    return inputs


def frozen_of(group):
    return tuple(f"{name}{i}" for i in range(len(group[2])) for name in ("w", "bias"))


def members_of(inputs, count, ps, weights=None, biases=None):
    return [
        LoraWeights(
            inputs[f"w{i}"] if weights is None else weights[i],
            inputs[f"bias{i}"] if biases is None else biases[i],
            inputs[f"a{i}"],
            inputs[f"b{i}"],
            SCALE + i,
            ps[i],
            30 + i,
        )
        for i in range(count)
    ]


def extend(inputs, count, ps):
    weights, biases = ([inputs[f"{name}{i}"] for i in range(count)] for name in ("w", "bias"))
    ranks = [inputs[f"a{i}"].shape[0] for i in range(count)]
    extended = ExtendedWeight.extend(weights, biases, ranks, weights[0].dtype)
    return extended, members_of(inputs, count, ps, extended.views, extended.bias_views)


def with_room(x, spare):
    """x as the first columns of a new buffer whose other columns are NaN; differentiable."""
    room = x.new_full((*x.shape[:-1], spare), float("nan"))
    return torch.cat((x, room), -1)[..., : x.shape[-1]]


def ours(backend, ps, spared):
    def call(x, **kw):
        extended, members = extend(kw, len(ps), ps)
        if not spared:
            return (lora_linear_extended(x, extended, members, spare=0, backend=backend),)
        x = with_room(x, extended.spare)
        return (lora_linear_extended(x, extended, members, spare=extended.spare, backend=backend),)

    return call


def eager(ps):
    """PEFT's order of operations."""

    def call(x, **kw):
        outputs = []
        for w in members_of(kw, len(ps), ps):
            base = torch.nn.functional.linear(x, w.weight, w.bias)
            zero = torch.zeros_like(w.weight)
            delta = lora_linear_reference(
                x, zero, w.lora_a, w.lora_b, scale=w.scale, dropout_p=w.dropout_p, dropout_seed=w.seed
            )
            outputs.append(base + delta)
        return (torch.cat(outputs, -1),)

    return call


@pytest.mark.parametrize("spared", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("backend, dtype", BACKEND_DTYPES)
def test_every_gradient(backend, dtype, group, p, spared):
    inputs, ps = inputs_of(group, dtype), (p, 0.0, p)[: len(group[2])]
    grad = torch.randn(group[0], sum(group[2]), generator=torch.Generator().manual_seed(1)).to(dtype)
    check_parity(ours(backend, ps, spared), eager(ps), inputs, upstream=(grad,), frozen=frozen_of(group))


@pytest.mark.interpreter
def test_down_is_split_if_rows_are_few():
    """With 520 rows of 2048 inputs, the Triton form adds partial sums of S in a second launch."""
    from ft_dist_kernels.lora.blocks import DOWN, blocks_for, split_columns

    inputs = inputs_of((520, 2048, (24, 16), (4, 4)), torch.float16)
    assert split_columns(520, 2048, blocks_for(DOWN, 32, hip=False, itemsize=2))[0] == 2
    extended, members = extend(inputs, 2, (0.1, 0.0))
    forms = []
    for backend in ("triton", "torch"):
        inputs["x"].as_strided((520, extended.spare), (2048 + extended.spare, 1), 2048).fill_(float("nan"))
        y = lora_linear_extended(inputs["x"], extended, members, spare=extended.spare, backend=backend)
        forms.append((y, lora_linear_group(inputs["x"], members, backend=backend)[0]))
    torch.testing.assert_close(forms[0], forms[1], rtol=2e-3, atol=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_agrees_with_separate_members(backend):
    inputs = inputs_of((19, 48, (40, 24, 8), (8, 4, 2)), torch.float32)
    ps = (0.2, 0.0, 0.4)
    extended, members = extend(inputs, 3, ps)
    together = lora_linear_extended(inputs["x"], extended, members, spare=extended.spare, backend=backend)
    apart = lora_linear_group(inputs["x"], members_of(inputs, 3, ps), backend=backend)
    torch.testing.assert_close(together, torch.cat(apart, 1))


@pytest.mark.parametrize("spared", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_b_that_changes_under_autograd_is_seen_by_the_next_forward(backend, spared):
    """As DeepSpeed's optimizer does: it writes to the parameter's storage without a version counter changing."""
    inputs = inputs_of((9, 32, (40, 24), (8, 4)), torch.float32)
    extended, members = extend(inputs, 2, (0.0, 0.0))
    spare = extended.spare if spared else 0

    def forward():
        return lora_linear_extended(inputs["x"], extended, members, spare=spare, backend=backend).clone()

    first = forward()
    inputs["b0"].data.mul_(-3.0)
    members[1].lora_b.data.zero_()
    second = forward()
    assert not torch.equal(first, second)
    expected = torch.cat(lora_linear_group(inputs["x"], members_of(inputs, 2, (0.0, 0.0)), backend="torch"), 1)
    torch.testing.assert_close(second, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_adapter_between_forward_and_backward_leaves_the_gradients(backend):
    """A reference adapter of another rank runs on the same weights before the first one's backward."""
    group = (9, 32, (40, 24), (8, 4))
    inputs = inputs_of(group, torch.float32)
    extended, members = extend(inputs, 2, (0.0, 0.0))
    leaves = [member.lora_a.requires_grad_() for member in members] + [inputs["x"].requires_grad_()]

    def loss():
        x = with_room(inputs["x"], extended.spare)
        return lora_linear_extended(x, extended, members, spare=extended.spare, backend=backend).square().sum()

    expected = torch.autograd.grad(loss(), leaves)
    pending = loss()
    other = [m._replace(lora_a=torch.randn(2, 32), lora_b=torch.randn(m.weight.shape[0], 2)) for m in members]
    with torch.no_grad():
        y = lora_linear_extended(inputs["x"].detach().clone(), extended, other, spare=0, backend=backend)
        apart = [
            lora_linear_reference(inputs["x"], m.weight, m.lora_a, m.lora_b, bias=m.bias, scale=m.scale) for m in other
        ]
    torch.testing.assert_close(y, torch.cat(apart, 1))
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(pending, leaves), expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_x_with_its_spare_columns_is_saved_per_token(backend):
    group = (29, 32, (40, 24), (8, 4))
    inputs = inputs_of(group, torch.float32)
    x = inputs["x"].requires_grad_()
    extended, members = extend(inputs, 2, (0.2, 0.0))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear_extended(x, extended, members, spare=extended.spare, backend=backend)
    of_tokens = [t for t in saved if t.shape[0] == 29]
    assert [t.shape[1] for t in of_tokens] == [32 + extended.spare]
    assert of_tokens[0].untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


@pytest.mark.parametrize("backend", BACKENDS)
def test_spare_columns_pass_the_version_check_and_a_change_of_x_fails_it(backend):
    inputs = inputs_of((9, 32, (40,), (8,)), torch.float32)
    extended, members = extend(inputs, 1, (0.0,))
    members[0].lora_a.requires_grad_()
    x = with_room(inputs["x"].requires_grad_(), extended.spare)
    kept = (x * x).sum()  # saves x before its spare columns are written
    y = lora_linear_extended(x, extended, members, spare=extended.spare, backend=backend)
    torch.autograd.grad(kept + y.sum(), inputs["x"], retain_graph=True)
    with torch.no_grad():
        x.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_saved_tensors_may_be_offloaded(backend):
    """Activation offload packs a copy, which must contain S."""
    inputs = inputs_of((9, 32, (40, 24), (8, 4)), torch.float32)
    leaves = [inputs[name].requires_grad_() for name in ("x", "a0", "a1", "b0", "b1")]

    def grads():
        extended, members = extend(inputs, 2, (0.2, 0.0))
        x = with_room(inputs["x"], extended.spare)
        y = lora_linear_extended(x, extended, members, spare=extended.spare, backend=backend)
        return y, x

    y, _ = grads()
    expected = torch.autograd.grad(y.square().sum(), leaves)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        y, x = grads()
    x.data.fill_(float("nan"))
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(y.square().sum(), leaves), expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_shape_strided_upstream_and_retained_graph(backend):
    inputs = inputs_of((24, 16, (24,), (4,)), torch.float32)
    inputs["x"] = torch.randn(2, 3, 4, 16)
    assert ours(backend, (0.0,), True)(**inputs)[0].shape == (2, 3, 4, 24)
    frozen = {name: inputs.pop(name) for name in ("w0", "bias0")}
    check_backward_twice(lambda **kw: ours(backend, (0.2,), True)(**frozen, **kw), inputs)
    inputs |= frozen
    inputs["a0"].requires_grad_()
    ours(backend, (0.0,), True)(**inputs)[0].sum().backward()  # an expanded gradient has stride 0
    dense = inputs["a0"].grad.clone()
    inputs["a0"].grad = None
    y = ours(backend, (0.0,), True)(**inputs)[0]
    y.backward(torch.ones_like(y))
    assert torch.equal(inputs["a0"].grad, dense)


@pytest.mark.parametrize("backend", BACKENDS)
def test_activation_checkpointing_draws_the_same_mask(backend):
    inputs = inputs_of((21, 16, (24,), (4,)), torch.float32)
    extended, members = extend(inputs, 1, (0.5,))
    members = [members[0]._replace(seed=None)]
    leaves = [tensor.requires_grad_() for tensor in (inputs["x"], members[0].lora_a, members[0].lora_b)]

    def call(x):
        return lora_linear_extended(
            with_room(x, extended.spare), extended, members, spare=extended.spare, backend=backend
        )

    torch.manual_seed(3)
    expected = torch.autograd.grad(call(leaves[0]).square().sum(), leaves)
    torch.manual_seed(3)
    got = torch.autograd.grad(checkpoint(call, leaves[0], use_reentrant=False).square().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_adapters_in_fp32_get_fp32_gradients():
    inputs = inputs_of((33, 48, (40, 24), (8, 4)), torch.bfloat16)
    for name in ("a0", "a1", "b0", "b1"):
        inputs[name] = inputs[name].float().requires_grad_()
    y = ours("torch", (0.0, 0.1), True)(**inputs)[0]
    assert y.dtype is torch.bfloat16
    y.float().sum().backward()
    for name in ("a0", "a1", "b0", "b1"):
        grad = inputs[name].grad
        assert grad.dtype is torch.float32
        assert not torch.equal(grad, grad.to(torch.bfloat16).float()), "accumulated in half precision"


def test_views_replace_the_parameters_storage():
    layers = [torch.nn.Linear(16, out, bias=out == 24) for out in (24, 8)]
    before = [layer.weight.detach().clone() for layer in layers]
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    extended = ExtendedWeight.extend(weights, biases, (3, 5), torch.float32)
    assert extended.spare == extended_spare((3, 5)) == 16
    assert extended.buffer.shape == (32, 32)
    assert not extended.buffer[:, 16:].any()
    for layer, view, bias in zip(layers, extended.views, extended.bias_views, strict=True):
        layer.weight.data = view
        if layer.bias is not None:
            layer.bias.data = bias
    assert all(torch.equal(layer.weight, kept) for layer, kept in zip(layers, before, strict=True))
    assert {layer.weight.untyped_storage().data_ptr() for layer in layers} == {
        extended.buffer.untyped_storage().data_ptr()
    }
    members = [LoraWeights(la.weight, la.bias, torch.zeros(3, 16), torch.zeros(1, 3)) for la in layers]
    assert extended.holds(members)
    layers[0].weight.data = before[0]
    assert not extended.holds(members)


def _change(index, **fields):
    """Replaces fields of one member."""
    return lambda x, members: (x, [m._replace(**fields) if i == index else m for i, m in enumerate(members)])


def _wide(x, members):
    return x, [m._replace(lora_a=torch.zeros(9, 16), lora_b=torch.zeros(m.weight.shape[0], 9)) for m in members]


@pytest.mark.parametrize(
    "change, spare, message",
    [
        (lambda x, m: (x, m), 15, "it must be 0 or this ExtendedWeight's 16"),
        (lambda x, m: (x.contiguous(), m), 16, "first 16 columns of a buffer with rows of 32"),
        (lambda x, m: (torch.empty(16, 40).t()[:9], m), 16, "first 16 columns"),
        (lambda x, m: (torch.empty(8 * 32 + 16).as_strided((9, 16), (32, 1)), m), 16, "storage of 272 elements"),
        (lambda x, m: (torch.empty(9, 2, 32)[..., :16].transpose(0, 1), m), 16, "first 16 columns"),
        (lambda x, m: (x.half(), m), 0, "float32"),
        (lambda x, m: (x, m[:1]), 16, "not the views"),
        (lambda x, m: (x, m * 2), 16, "1 to 3 members, not 4"),
        (_change(1, weight=torch.zeros(8, 16)), 16, "not the views"),
        (_change(0, bias=None), 16, "not the views"),
        (_change(0, weight=torch.zeros(24, 16, requires_grad=True)), 16, r"members\[0\] is trained"),
        (_change(1, dora_magnitude=torch.ones(8)), 16, r"members\[1\] uses DoRA"),
        (_change(0, weight=quantize_nf4(torch.randn(24, 64))), 16, r"members\[0\] is quantised"),
        (_change(0, lora_b=torch.zeros(24, 5)), 16, r"lora_b \(24, 5\)"),
        (_wide, 16, "need 18 spare columns"),
    ],
)
def test_errors_name_the_value(change, spare, message):
    inputs = inputs_of((9, 16, (24, 8), (4, 4)), torch.float32)
    extended, members = extend(inputs, 2, (0.0, 0.0))
    x, members = change(inputs["x"], members)
    with pytest.raises(ValueError, match=message):
        lora_linear_extended(x, extended, members, spare=spare)


def test_autocast_to_another_dtype_is_refused():
    inputs = inputs_of((9, 16, (24,), (4,)), torch.float32)
    extended, members = extend(inputs, 1, (0.0,))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="autocast uses"):
        lora_linear_extended(inputs["x"], extended, members, spare=0)


def test_suits_extended():
    inputs = inputs_of((9, 16, (24, 8), (4, 4)), torch.bfloat16)
    members = members_of(inputs, 2, (0.0, 0.0))
    half, cuda = torch.bfloat16, "cuda"
    assert suits_extended(members, dtype=half, device=cuda)
    assert not suits_extended(members, dtype=half, device="cpu")
    assert not suits_extended(members, dtype=torch.float16, device=cuda)
    assert not suits_extended(members * 2, dtype=half, device=cuda)
    for change in (
        {"dora_magnitude": torch.ones(24)},
        {"weight": torch.zeros(0, dtype=half)},
        {"weight": quantize_nf4(torch.randn(24, 64))},
        {"weight": members[0].weight.clone().requires_grad_()},
        {"bias": members[0].bias.clone().requires_grad_()},
        {"lora_a": torch.zeros(65, 16), "lora_b": torch.zeros(24, 65)},
        {"weight": torch.zeros(24, 17, dtype=half)},
    ):
        assert not suits_extended([members[0]._replace(**change), members[1]], dtype=half, device=cuda), change
