"""A product that the backward pass recomputes: the same bits as a stored one, and nothing stores it."""

import pytest
import torch
from ft_dist_kernels.glu.op import swiglu
from ft_dist_kernels.lora.op import LoraWeights, lora_linear_group
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from ft_dist.model.fused.recompute import recomputed


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    made = {"gate": (3, 5, 24), "up": (3, 5, 24), "weight": (16, 24), "a": (4, 24), "b": (16, 4), "size": (16,)}
    return {name: torch.randn(shape, generator=generator).to(dtype).requires_grad_() for name, shape in made.items()}


def linear(x, w):
    return nn.functional.linear(x, w["weight"])


def lora(x, w, magnitude=None):
    member = LoraWeights(w["weight"], None, w["a"], w["b"], 2.0, 0.25, 7, magnitude)
    return lora_linear_group(x, [member], backend="torch")[0]


def dora(x, w):
    return lora(x, w, w["size"].abs())


def twice(x, w):
    """As in peft's own form: two layers keep x."""
    return linear(x, w) + nn.functional.linear(nn.functional.linear(x, w["a"]), w["b"])


def counted(made, gate, up):
    def recipe():
        made.append(1)
        return swiglu(gate, up)

    return recipe


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", [linear, lora, dora, twice])
def test_gradients_have_the_bits_of_a_stored_product(layer, dtype):
    results = []
    for again in (False, True):
        w = inputs(dtype)
        gate, up = w["gate"] * 2, w["up"] * 2
        product = swiglu(gate, up)
        made = []

        recipe = counted(made, gate.detach(), up.detach())
        memory = StorageWeakRef(product.untyped_storage())
        if again:
            with recomputed(product, recipe):
                output = layer(product, w)
        else:
            output = layer(product, w)
        del product
        assert memory.expired() == again
        wanted = [tensor for name, tensor in w.items() if name != "size" or layer is dora]
        upstream = torch.full_like(output, 0.375)
        first = torch.autograd.grad(output, wanted, upstream, retain_graph=True, allow_unused=True)
        second = torch.autograd.grad(output, wanted, upstream, allow_unused=True)
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert (len(made) > 0) == again
        results.append(first)
    assert sum(grad is not None for grad in results[0]) >= 3
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*results, strict=True))


class _Behind(torch.autograd.Function):
    """Writes into spare columns after the rows of x, as merged layers do, and saves everything in one tensor."""

    @staticmethod
    def forward(ctx, x_TI, values_TS):
        x_TK = x_TI.as_strided((len(x_TI), x_TI.stride(0)), (x_TI.stride(0), 1))
        x_TK.data[:, x_TI.shape[1] :] = values_TS
        ctx.save_for_backward(x_TK)
        return x_TI.sum()

    @staticmethod
    def backward(ctx, upstream):
        (x_TK,) = ctx.saved_tensors
        return upstream * x_TK[:, :8].clone(), upstream * x_TK[:, 8:].clone()


def test_spare_columns_written_by_others_are_kept():
    gate, values = torch.randn(5, 8, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    product = swiglu(gate, gate, spare=4)
    expected, memory = product.detach().clone(), StorageWeakRef(product.untyped_storage())
    kept = gate.detach()
    with recomputed(product, lambda: swiglu(kept, kept, spare=4)):
        output = _Behind.apply(product, values)
    grads = []
    product.register_hook(grads.append)
    del product
    output.backward()
    assert torch.equal(grads[0], expected)
    assert torch.equal(values.grad, values)
    del output
    assert memory.expired()


def test_a_frozen_layer_recomputes_nothing():
    gate = torch.randn(2, 8, requires_grad=True)
    weight = torch.randn(4, 8)
    product = swiglu(gate, gate)

    def recipe():
        raise AssertionError("nobody needs the product")

    with recomputed(product, recipe):
        output = nn.functional.linear(product, weight)
    output.sum().backward()
    assert gate.grad is not None


def test_parameters_are_not_copied():
    """ZeRO-3 frees a weight after forward and gathers it at another address before backward."""
    w = {name: nn.Parameter(tensor.detach()) for name, tensor in inputs().items()}
    values, x = w["weight"].detach().clone(), w["gate"]
    expected = torch.autograd.grad(lora(x * 2, w).sum(), x)[0]
    with recomputed(product := x * 2, lambda: x.detach() * 2):
        output = lora(product, w)
    memory = StorageWeakRef(w["weight"].untyped_storage())
    w["weight"].data = torch.empty(0)
    assert memory.expired()
    w["weight"].data = values
    assert torch.equal(torch.autograd.grad(output.sum(), x)[0], expected)
