"""Linear layers that share x: values and gradients against fp64 truth, with torch's own layer as the tolerance."""

import pytest
import torch
from ft_dist_kernels.linear import gains_from_onednn, linear_group, linear_group_reference

from tests.kernels.parity import check_parity

SHAPES = [(64, 128, (256, 64)), (37, 67, (101,)), (1, 64, (64, 64, 64)), (9, 8, (4, 100)), (0, 64, (64,))]


def make_inputs(shape, dtype, bias):
    tokens, inner, outs = shape
    generator = torch.Generator().manual_seed(0)
    inputs = {"x": torch.randn(tokens, inner, generator=generator).to(dtype)}
    for index, out in enumerate(outs):
        inputs[f"weight{index}"] = (torch.randn(out, inner, generator=generator) * inner**-0.5).to(dtype)
        inputs[f"bias{index}"] = torch.randn(out, generator=generator).to(dtype) if bias else None
    return inputs


def members(flat):
    return [(flat[f"weight{index}"], flat.get(f"bias{index}")) for index in range(len(flat) // 2)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("frozen", [(), ("weight0", "bias0"), ("x",)], ids=str)
def test_parity(shape, dtype, bias, frozen):
    generator = torch.Generator().manual_seed(1)
    upstream = tuple((torch.randn(shape[0], out, generator=generator) * 1.7).to(dtype).float() for out in shape[2])
    check_parity(
        lambda x, **flat: tuple(linear_group(x, members(flat))),
        lambda x, **flat: tuple(linear_group_reference(x, members(flat))),
        make_inputs(shape, dtype, bias),
        upstream=upstream,
        frozen=frozen,
    )


def test_an_unused_output_gives_its_weight_no_gradient():
    inputs = make_inputs((8, 64, (64, 64)), torch.float32, True)
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    linear_group(leaves["x"], members({k: v for k, v in leaves.items() if k != "x"}))[1].sum().backward()
    assert leaves["weight0"].grad is None
    torch.testing.assert_close(leaves["x"].grad, leaves["weight1"].sum(0).expand(8, 64))


def test_leading_shapes_and_a_weight_of_the_wrong_width():
    weight = torch.randn(6, 5)
    assert linear_group(torch.randn(2, 3, 5), [(weight, None)])[0].shape == (2, 3, 6)
    with pytest.raises(ValueError, match="must be \\(out, 4\\)"):
        linear_group(torch.randn(2, 4), [(weight, None)])


def test_half_precision_is_left_to_torch():
    x, weight = torch.randn(8, 64), torch.randn(64, 64)
    assert not gains_from_onednn(x.bfloat16(), weight.bfloat16())
