"""Shared by the parity tests of ops: fp64 truth, a tolerance from the eager form of the same dtype, poisoned memory.

The rule: |ours - truth| <= 2 |eager - truth| + 1e-6, for the largest error and for the relative norm, where truth is
the reference in fp64 on the same (already rounded) inputs and upstream gradients. The error of a sum over tokens
is one random number, which may happen to be near zero; so a sum is compared with the errors of its terms instead.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import Tensor

BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.interpreter)]
# the interpreter's bf16 arithmetic is wrong, so only the CPU form is tested in it
BACKEND_DTYPES = [
    pytest.param("torch", torch.float32, id="torch-fp32"),
    pytest.param("torch", torch.bfloat16, id="torch-bf16"),
    pytest.param("triton", torch.float32, id="triton-fp32", marks=pytest.mark.interpreter),
    pytest.param("triton", torch.float16, id="triton-fp16", marks=pytest.mark.interpreter),
]
TOLERANCE = 1e-6

Outputs = tuple[Tensor, ...]


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory from torch.empty and similar holds NaN (integers: a huge value), so that an unwritten element shows."""

    def poison(allocate):
        def call(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if tensor.is_floating_point():
                return tensor.fill_(float("nan"))
            return tensor if tensor.dtype is torch.bool else tensor.fill_(torch.iinfo(tensor.dtype).max)

        return call

    with mock.patch.multiple(
        torch,
        empty=poison(torch.empty),
        empty_like=poison(torch.empty_like),
        empty_strided=poison(torch.empty_strided),
    ), mock.patch.multiple(
        Tensor,
        new_empty=poison(Tensor.new_empty),
        new_empty_strided=poison(Tensor.new_empty_strided),
    ):  # fmt: skip
        yield


def assert_no_further(ours: Tensor, eager: Tensor, truth: Tensor, name: str) -> None:
    """Our error is at most twice eager's, by largest error and by relative norm.

    The largest error of a result rounded twice (when computed, and when scaled by the upstream gradient) may be one
    step of its dtype even if eager's is less; the same holds for the norm of a single element, and in part for larger
    results.
    """
    assert ours.shape == truth.shape, f"{name}: shape {tuple(ours.shape)}, not {tuple(truth.shape)}"
    if truth.numel() == 0:
        return
    step = torch.finfo(ours.dtype).eps if ours.is_floating_point() else 0.0
    ours, eager, truth = ours.double(), eager.double(), truth.double()
    assert ours.isfinite().all(), f"{name}: {int((~ours.isfinite()).sum())} elements are not finite"
    largest, norm = float(truth.abs().max()), max(float(truth.norm()), 1e-30)
    for measure, unit, floor in (
        (lambda error: float(error.abs().max()), max(1.0, largest), step * largest),
        (lambda error: float(error.norm()) / norm, 1.0, step / math.sqrt(truth.numel())),
    ):
        error, allowed = measure(ours - truth), max(2 * measure(eager - truth), floor) + TOLERANCE * unit
        assert error <= allowed, f"{name}: error {error:.3e} is above 2 x eager's + tolerance = {allowed:.3e}"


def assert_sum_no_further(ours: Tensor, eager_terms: Tensor, true_terms: Tensor, name: str) -> None:
    """A sum's error is at most twice that of its terms together in the eager form."""
    truth = true_terms.double().sum()
    allowed = 2 * float((eager_terms.double() - true_terms.double()).abs().sum()) + TOLERANCE * max(1.0, abs(truth))
    error = abs(ours.double() - truth)
    assert error <= allowed, f"{name}: error {error:.3e} is above 2 x that of eager's terms + tolerance = {allowed:.3e}"


def leaves(inputs: dict[str, Tensor | None], dtype: torch.dtype | None, frozen: tuple[str, ...]) -> dict:
    """Fresh leaves with the strides of the inputs; floating ones in `dtype`, requiring gradients unless frozen."""
    result: dict[str, Tensor | None] = {}
    for name, tensor in inputs.items():
        if tensor is None or not tensor.is_floating_point():
            result[name] = tensor
            continue
        kind = tensor.dtype if dtype is None else dtype
        leaf = torch.empty_strided(tensor.shape, tensor.stride(), dtype=kind) if tensor.numel() else tensor.to(kind)
        leaf = leaf.copy_(tensor).detach() if tensor.numel() else leaf.clone()
        result[name] = leaf.requires_grad_(name not in frozen)
    return result


def run(
    function: Callable[..., Outputs],
    inputs: dict[str, Tensor | None],
    upstream: Outputs,
    dtype: torch.dtype | None,
    frozen: tuple[str, ...],
) -> tuple[Outputs, dict[str, Tensor]]:
    """Outputs and gradients of `function(**inputs)` for the upstream gradients (cloned: a kernel may not keep them)."""
    arguments = leaves(inputs, dtype, frozen)
    outputs = function(**arguments)
    roots = [output for output in outputs if output.requires_grad]
    upstream = tuple(grad.to(root.dtype) for root, grad in zip(roots, upstream, strict=True))
    torch.autograd.backward(roots, [grad.clone() for grad in upstream])
    grads = {name: tensor.grad for name, tensor in arguments.items() if tensor is not None and tensor.grad is not None}
    return tuple(output.detach() for output in outputs), grads


def check_parity(
    ours: Callable[..., Outputs],
    eager: Callable[..., Outputs],
    inputs: dict[str, Tensor | None],
    *,
    upstream: Outputs,
    frozen: tuple[str, ...] = (),
    terms: Callable[..., Outputs] | None = None,
) -> None:
    """Check outputs and gradients against the truth with poisoned memory, unchanged inputs, and equal bits of two runs.

    `inputs` are already in the dtype under test. `upstream` holds one gradient per differentiable output. If
    outputs are sums, `terms` is the eager form of their terms.
    """
    before = {name: tensor.clone() for name, tensor in inputs.items() if tensor is not None}
    expected, expected_grads = run(eager, inputs, upstream, torch.float64, frozen)
    yard, yard_grads = run(eager, inputs, upstream, None, frozen)
    with poisoned():
        first, grads = run(ours, inputs, upstream, None, frozen)
        second, grads_again = run(ours, inputs, upstream, None, frozen)
    assert set(grads) == set(expected_grads), f"gradients of {sorted(grads)}, not of {sorted(expected_grads)}"
    if terms is not None:
        true_terms, eager_terms = (terms(**leaves(inputs, kind, tuple(inputs))) for kind in (torch.float64, None))
    for index, output in enumerate(first):
        if terms is None:
            assert_no_further(output, yard[index], expected[index], f"output {index}")
        else:
            assert_sum_no_further(output, eager_terms[index], true_terms[index], f"output {index}")
        assert torch.equal(output, second[index]), f"output {index} differs between two runs"
    for name, grad in grads.items():
        assert_no_further(grad, yard_grads[name], expected_grads[name], f"gradient of {name}")
        assert torch.equal(grad, grads_again[name]), f"gradient of {name} differs between two runs"
    for name, tensor in before.items():
        assert torch.equal(inputs[name], tensor), f"input {name} was changed"


def check_backward_twice(function: Callable[..., Outputs], inputs: dict[str, Tensor | None]) -> None:
    """A retained graph gives the same gradients again and does not change the upstream gradient."""
    arguments = leaves(inputs, None, ())
    output = function(**arguments)[0]
    upstream = torch.full_like(output, 0.375)
    wanted = [tensor for tensor in arguments.values() if tensor is not None and tensor.requires_grad]
    first = torch.autograd.grad(output, wanted, upstream, retain_graph=True)
    kept = [grad.clone() for grad in first]
    second = torch.autograd.grad(output, wanted, upstream)
    assert all(torch.equal(a, b) for a, b in zip(kept, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(kept, first, strict=True))
    assert torch.equal(upstream, torch.full_like(output, 0.375))
