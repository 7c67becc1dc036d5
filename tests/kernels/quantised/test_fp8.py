"""FP8: the quantiser's bits, and each product against fp64 within the bound that e4m3's rounding gives."""

from unittest import mock

import pytest
import torch
from ft_dist_kernels.lora.op import LoraWeights, lora_linear_group
from ft_dist_kernels.quantised.fp8 import (
    fp8_backward,
    fp8_forward,
    fp8_linear,
    fp8_reason_not,
    hold_fp8,
    quantize_rows,
    quantize_rows_reference,
    scaled_product,
)
from ft_dist_kernels.quantised.fp8_format import E4M3
from ft_dist_kernels.quantised.nf4 import quantize_nf4

from tests.kernels.parity import BACKENDS, poisoned

SHAPES = [(1, [64]), (37, [576]), (8, [64, 32, 32]), (5, [160, 160]), (3, [48, 4096])]
ROUNDING = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-7}
"""Rounding of an output: its dtype's (in bf16 before and after the scales), and that of sums in fp32"""


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def code_error(x):
    """The largest possible error of a row's codes, element by element, in fp64."""
    x = x.double()
    scale = x.abs().amax(-1, keepdim=True) / 448
    return torch.maximum(x.abs() * 2.0**-4, scale * 2.0**-10) * (1 + 1e-5)


def product_bound(x, w, dtype, dw=None):
    """Truth x w^T in fp64, and the error bound of a product of codes (rows scaled). `dw`: given if w's codes are those
    of longer rows."""
    dx, dw, x, w = code_error(x), code_error(w) if dw is None else dw, x.double(), w.double()
    off = dx @ w.abs().t() + (x.abs() + dx) @ dw.t()
    truth = x @ w.t()
    return truth, off + ROUNDING[dtype] * (truth.abs() + off)


def on_grid(x):
    """Values near x that are codes times a power of two, with 448 in the first column: quantising them is exact."""
    codes = quantize_rows_reference([x.float()])[0].float()
    codes[:, 0] = 448.0
    return codes * torch.exp2(-(torch.arange(len(x)) % 12))[:, None]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("tokens, widths", SHAPES)
def test_quantised_rows(backend, dtype, tokens, widths):
    parts = [random(tokens, width, seed=i) * 4.0**i for i, width in enumerate(widths)]
    parts[0] = parts[0] * torch.logspace(-4, 1, tokens)[:, None]
    if backend == "triton":
        # the interpreter's cast to e4m3 loses the carry of its rounding; the GPU's is an instruction
        parts = list(on_grid(torch.cat(parts, 1)).split(widths, 1))
    parts = [part.to(dtype) for part in parts]
    strided = [torch.cat([part, part], 1)[:, : part.shape[1]] for part in parts]
    with poisoned():
        codes, scale = quantize_rows(strided, backend=backend)
    x = torch.cat(parts, 1)
    wanted, wanted_scale = quantize_rows_reference([x])
    assert codes.dtype == E4M3
    assert codes.shape == x.shape
    assert scale.shape == (tokens,)
    assert torch.equal(codes.view(torch.uint8), wanted.view(torch.uint8))
    assert torch.equal(scale, wanted_scale)
    assert (codes.float().abs().amax(1) == 448).all()
    assert ((codes.double() * scale.double()[:, None] - x.double()).abs() <= code_error(x)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_at_the_edges(backend):
    x = on_grid(random(8, 64))
    x[0], x[1, 5], x[2, 3], x[3, 7] = 0.0, float("inf"), float("nan"), -float("inf")
    x[4] = 2.0**-140  # a subnormal fp32 number
    x[5] *= 1e-15  # as small as gradients can be
    x[6] *= 3e37
    codes, scale = quantize_rows([x], backend=backend)
    back = codes.float() * scale[:, None]
    assert not back[0].any()
    assert scale[0].isfinite()
    assert back[1:4].isnan().all()
    assert not back[4].any()
    assert scale[4].isfinite()
    for row in (5, 6, 7) if backend == "torch" else ():
        assert ((back[row].double() - x[row].double()).abs() <= code_error(x[row])).all()


def test_a_non_finite_row_stays_visible_in_the_product():
    (weight,) = hold_fp8([random(32, 64)])
    x = random(3, 64)
    x[1, 9] = float("inf")
    (y,) = fp8_forward(x, [weight])
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tokens", [1, 37, 256])
@pytest.mark.parametrize("outs", [[96], [64, 32, 32], [160, 160]])
def test_products_are_within_the_bound(dtype, tokens, outs):
    dense = [random(out, 576, dtype=dtype, seed=i + 1) * 0.05 for i, out in enumerate(outs)]
    held = hold_fp8(dense)
    x = random(tokens, 576, dtype=dtype) * torch.logspace(-2, 1, 576).to(dtype)
    dys = [random(tokens, out, dtype=dtype, seed=i + 7) * 1e-6 for i, out in enumerate(outs)]
    for y, w in zip(fp8_forward(x, held), dense, strict=True):
        truth, bound = product_bound(x, w, dtype)
        assert y.dtype == dtype
        assert y.is_contiguous()
        assert ((y.double() - truth).abs() <= bound).all()
        assert (y.double() - truth).norm() < 0.07 * truth.norm()
    truth, bound = product_bound(torch.cat(dys, 1), torch.cat(dense).t(), dtype)
    dx = fp8_backward(dys, held)
    assert dx.dtype == dtype
    assert ((dx.double() - truth).abs() <= bound).all()
    assert (dx.double() - truth).norm() < 0.07 * truth.norm()
    # a few of the group, each on its own
    of_group = code_error(torch.cat(dense).t())[:, -outs[-1] :]
    truth, bound = product_bound(dys[-1], dense[-1].t(), dtype, of_group)
    alone = fp8_backward(dys[-1:], held[-1:])
    assert ((alone.double() - truth).abs() <= bound).all()


@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 2.0**-22), (torch.bfloat16, 2.0**-6.9)])
def test_the_emulated_product_equals_the_product_of_the_codes(dtype, rounding):
    codes, scale = quantize_rows([random(16, 64)])
    other, other_scale = quantize_rows([random(32, 64, seed=1)])
    exact = (codes.double() @ other.double().t()) * scale.double()[:, None] * other_scale.double()
    ours = scaled_product(codes, scale, other, other_scale, dtype)
    assert ours.dtype == dtype
    assert ((ours.double() - exact).abs() <= rounding * exact.abs() + 1e-5 * exact.abs().max()).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("chosen", [[0, 1, 2], [1], [2, 0]])
def test_lora_on_fp8_equals_lora_on_the_dequantised_weights(backend, dropout, chosen):
    """With x and dY that codes represent exactly, only the weights are rounded."""
    outs, width, rank, tokens = [64, 32, 32], 48, 4, 24
    held = hold_fp8([random(out, width, seed=i) for i, out in enumerate(outs)])
    small = torch.Generator().manual_seed(5)
    x = torch.randint(-8, 9, (tokens, width), generator=small).float()
    x[:, 0] = 448
    dys = [torch.randint(-8, 9, (tokens, outs[i]), generator=small).float() for i in chosen]
    for dy in dys:
        dy[:, 0] = 448
    x.requires_grad_()
    factors = {
        i: (random(rank, width, seed=20 + i).requires_grad_(), random(outs[i], rank, seed=30 + i).requires_grad_())
        for i in chosen
    }

    def run(weights):
        members = [LoraWeights(weights[i], None, *factors[i], 2.0, dropout, 9 + i) for i in chosen]
        outputs = lora_linear_group(x, members, backend=backend)
        return outputs, torch.autograd.grad(outputs, [x, *(f for i in chosen for f in factors[i])], dys)

    def by_rows(weight):
        matrix = weight.matrix
        return (matrix.by_output.float() * matrix.output_scale[:, None])[weight.begin : weight.end]

    def by_columns(weight):
        matrix = weight.matrix
        return (matrix.by_input.float() * matrix.input_scale[:, None])[:, weight.begin : weight.end].t().contiguous()

    outputs, grads = run(held)
    wanted, _ = run([by_rows(weight) for weight in held])
    _, wanted_grads = run([by_columns(weight) for weight in held])
    for ours, theirs in zip([*outputs, grads[0]], [*wanted, wanted_grads[0]], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=5e-3)  # compared with outputs of hundreds
    for ours, theirs in zip(grads[1:], wanted_grads[1:], strict=True):
        assert torch.equal(ours, theirs)


def test_fp8_with_other_weights_and_a_member_without_gradient():
    dense = [random(32, 64, seed=i) for i in range(3)]
    held = hold_fp8(dense[:2])
    x = random(6, 64).requires_grad_()
    ab = [(random(4, 64, seed=40 + i), random(32, 4, seed=50 + i)) for i in range(3)]
    mixed = [held[0], held[1], quantize_nf4(dense[2])]
    outputs = lora_linear_group(x, [LoraWeights(w, None, a, b) for w, (a, b) in zip(mixed, ab, strict=True)])
    assert (outputs[0] - x @ dense[0].t() - (x @ ab[0][0].t()) @ ab[0][1].t()).norm() < 0.05 * outputs[0].norm()
    (dx,) = torch.autograd.grad(outputs[1].sum(), x)
    truth = (dense[1] + ab[1][1] @ ab[1][0]).sum(0).expand(6, 64)
    assert (dx - truth).norm() < 0.05 * truth.norm()


def test_linear_without_adapter():
    w, bias, x = random(32, 64, seed=1), random(32, seed=2), random(2, 5, 64).requires_grad_()
    (weight,) = hold_fp8([w])
    y = fp8_linear(x, weight, bias)
    assert y.shape == (2, 5, 32)
    assert (y - x @ w.t() - bias).norm() < 0.05 * y.norm()
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    truth = 2 * (x @ w.t() + bias) @ w
    assert (dx - truth).norm() < 0.07 * truth.norm()
    assert fp8_linear(x[:0], weight).shape == (0, 5, 32)


def test_unsupported_inputs_are_refused():
    with pytest.raises(ValueError, match="multiples of 16"):
        hold_fp8([random(32, 60)])
    with pytest.raises(ValueError, match="not finite"):
        hold_fp8([random(32, 64).index_fill_(0, torch.tensor([3]), float("nan"))])
    (weight,) = hold_fp8([random(32, 64)])
    with pytest.raises(ValueError, match="reads 64"):
        fp8_linear(random(3, 48), weight)
    a, b = random(4, 64), random(32, 4)
    with pytest.raises(ValueError, match="DoRA"):
        lora_linear_group(random(3, 64), [LoraWeights(weight, None, a, b, dora_magnitude=random(32))])


@pytest.mark.parametrize("capability, fits", [((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True)])
def test_chips_without_fp8(capability, fits):
    with (
        mock.patch.multiple(
            torch.cuda, get_device_capability=lambda device: capability, get_device_name=lambda device: "a chip"
        ),
        mock.patch("ft_dist_kernels.quantised.fp8._refusal_of_product", return_value=None),
    ):
        reason = fp8_reason_not(torch.device("cuda", 0))
    assert (reason is None) == fits
    assert fits or f"capability {capability[0]}.{capability[1]}" in reason
    assert fp8_reason_not(torch.device("cpu")) is None


def test_a_torch_without_the_product_for_a_chip_is_the_reason():
    """As torch 2.10 on consumer Blackwell, whose compute capability would suffice."""
    from ft_dist_kernels.quantised import fp8

    def refuse(*_, **__):
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED when calling cublasLtMatmul\nmore")

    fp8._refusal_of_product.cache_clear()
    with mock.patch.object(torch.cuda, "get_device_name", return_value="a chip"):
        assert fp8._refusal_of_product(torch.device("cpu")) is None
        fp8._refusal_of_product.cache_clear()
        with mock.patch.object(fp8, "scaled_product", refuse):
            reason = fp8._refusal_of_product(torch.device("cpu"))
    fp8._refusal_of_product.cache_clear()
    assert reason.endswith("no FP8 product for a chip: CUBLAS_STATUS_NOT_SUPPORTED when calling cublasLtMatmul")


def test_the_gpu_product_takes_these_layouts():
    """torch's own checks of `_scaled_mm`, on tensors without data."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        for tokens in (1, 37):
            codes = torch.empty(tokens, 64, device="meta", dtype=E4M3)
            rows = torch.empty(128, 64, device="meta", dtype=E4M3)[32:96]
            y = torch._scaled_mm(
                codes,
                rows.t(),
                scale_a=torch.empty(256, device="meta")[:tokens][:, None],
                scale_b=torch.empty(128, device="meta")[32:96][None, :],
                out_dtype=torch.bfloat16,
                use_fast_accum=True,
            )
            assert y.shape == (tokens, 64)
