"""The loop over chunks of rows in `linear_cross_entropy`: matrix products around one softmax step.

Chunk size: a GPU needs >= 1024 rows per chunk to be bound by the matrix product rather than by reading the weight
(at H=4096 on an H200: 735 rows with an fp32 weight gradient), a CPU about 256 (measured at H=576, V=49152, T=2048 on
one AVX512 core: 2.8 s forward and backward at 128 rows, 2.4 from 256 to 683, 2.2 at 1024; whole logits 3.1).
Beyond that only memory matters, and the budgets in `sizes.py` keep it small.

The matrix products of the CPU form run in fp32, with weights in half precision widened tile by tile into one buffer
that stays in cache. Without AVX512-BF16 or AMX a bf16 product is five times slower (measured); with them torch has no
bf16 product with fp32 logits, and rounding the logits changed the gradient norm of a small model by over 2%. The
gradient of the logits may be rounded before the product that gives the hidden states' gradient, as in the eager form:
there such a CPU uses bf16.

Shapes: T tokens, N labelled tokens, n rows of a chunk, H hidden, V vocabulary, v a tile of it, R LoRA rank.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ft_dist_kernels.cross_entropy.types import Gradients, Head, Options, PerToken, Wanted
from ft_dist_kernels.products import matmul, matmul_into, widens
from ft_dist_kernels.sizes import chunk_rows, tile_rows

SCALED_ROWS = 4096


def run_chunks(
    head: Head,
    hidden: Tensor,
    lora_hidden: Tensor | None,
    rows_N: Tensor | None,
    labels_N: Tensor,
    weights_N: Tensor | None,
    wanted: Wanted,
) -> tuple[PerToken, Gradients]:
    """Loss, nll and hit of every labelled row, and the gradients of the summed loss that are `wanted`."""
    count, vocabulary = labels_N.numel(), head.weight.shape[0]
    hidden_TH = hidden.reshape(-1, hidden.shape[-1])
    lora_hidden_TH = None if lora_hidden is None else lora_hidden.reshape(hidden_TH.shape)
    dtype = _product_dtype(hidden_TH, head.options.triton)
    tokens = PerToken(
        loss=torch.empty(count, device=hidden.device, dtype=torch.float32),
        nll=torch.empty(count, device=hidden.device, dtype=torch.float32),
        correct=torch.empty(count, device=hidden.device, dtype=torch.int32),
    )
    grads = _allocate(head, hidden_TH, count, wanted)
    gpu = hidden.device.type not in ("cpu", "mps")
    rows = chunk_rows(count, vocabulary, gpu=gpu, bytes_per_logit=_bytes_per_logit(head, dtype))
    logits_nV = torch.empty(min(rows, count), vocabulary, device=hidden.device, dtype=dtype)
    rounds = wanted.hidden and _rounds(head, dtype)
    rounded_nV = torch.empty_like(logits_nV, dtype=head.weight.dtype) if rounds else None
    softmax_step = _triton_softmax_step() if head.options.triton else softmax_step_torch
    for start in range(0, count, rows):
        chunk = slice(start, min(start + rows, count))
        hidden_nH = _take(hidden_TH, rows_N, chunk, dtype)
        source_nH = hidden_nH if lora_hidden_TH is None else _take(lora_hidden_TH, rows_N, chunk, dtype)
        logits = logits_nV[: chunk.stop - start]
        s_nR = _logits_into(logits, head, hidden_nH, source_nH)
        softmax_step(
            logits,
            labels_N[chunk],
            None if weights_N is None else weights_N[chunk],
            head.bias,
            head.options,
            PerToken(*(tensor[chunk] for tensor in tokens)),
            want_grad=any(wanted),
        )
        if any(wanted):
            rounded = None if rounded_nV is None else rounded_nV[: len(logits)].copy_(logits)
            _accumulate(grads, logits, rounded, head, hidden_nH, source_nH, s_nR, chunk)
    return tokens, grads


def _take_back(grad_NH: Tensor | None, rows_N: Tensor | None, shape: torch.Size, scale: Tensor | None) -> Tensor | None:
    """The labelled rows' gradient times `scale`, scattered into zeros; computed in place if every row is labelled.

    The product is made in fp32 and rounded once: a 0-dim fp32 factor would first be rounded to the dtype of a bf16
    gradient, so it is given a dimension. On CPU the widened rows are bounded.
    """
    if grad_NH is None:
        return None
    grad_TH = grad_NH if rows_N is None else grad_NH.new_zeros(shape).view(-1, shape[-1])
    step = SCALED_ROWS if grad_NH.device.type == "cpu" else max(grad_NH.shape[0], 1)
    for start in range(0, grad_NH.shape[0], step):
        part = grad_NH[start : start + step]
        if scale is not None:
            torch.mul(part, scale.view(1, 1), out=part)
        if rows_N is not None:
            grad_TH.index_copy_(0, rows_N[start : start + step], part)
    return grad_TH.view(shape)


def input_gradients(
    grads: Gradients,
    rows_N: Tensor | None,
    shape: torch.Size,
    dtypes: list[torch.dtype | None],
    scale: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """What backward returns. Consumes `grads`: they are scaled in place and returned."""
    shared = []
    for grad, dtype in zip(grads[1:5], dtypes, strict=True):
        if grad is not None and scale is not None:
            grad.mul_(scale)
        shared.append(None if grad is None else grad.to(dtype))
    tokenwise = [_take_back(grad, rows_N, shape, scale) for grad in (grads.hidden, grads.lora_hidden)]
    return (tokenwise[0], *shared, tokenwise[1], None, None, None, None, None, None)


def softmax_step_torch(
    logits_nV: Tensor,
    labels_n: Tensor,
    weights_n: Tensor | None,
    bias_V: Tensor | None,
    options: Options,
    out: PerToken,
    *,
    want_grad: bool,
) -> None:
    """Fills `out` and, if wanted, replaces the raw logits by the gradient of the chunk's loss over them."""
    x_nV = logits_nV.float()
    if bias_V is not None:
        x_nV.add_(bias_V)
    if options.logit_scale != 1.0:
        x_nV.mul_(options.logit_scale)
    tanh_nV = None if options.softcap is None else x_nV.div_(options.softcap).tanh_()
    z_nV = x_nV if tanh_nV is None else tanh_nV * options.softcap
    labels_n1 = labels_n[:, None]
    if logits_nV.device.type != "cpu":
        bad_n = (labels_n < 0) | (labels_n >= logits_nV.shape[1])
        labels_n1 = labels_n1.clamp(0, logits_nV.shape[1] - 1)
        z_nV[:, 0].masked_fill_(bad_n, float("nan"))
    z_label_n = z_nV.gather(1, labels_n1).squeeze(1)
    peak_n = z_nV.amax(1)
    total_n = z_nV.sub_(peak_n[:, None]).exp_().sum(1)
    lse_n = total_n.log().add_(peak_n)
    torch.sub(lse_n, z_label_n, out=out.nll)
    out.correct.copy_(z_label_n >= peak_n)
    torch.mul(out.nll, 1.0 if weights_n is None else weights_n, out=out.loss)
    if not want_grad:
        return

    # d raw = logit_scale (1 - tanh^2) w (p - onehot)
    scale_n = torch.full_like(lse_n, options.logit_scale)
    if weights_n is not None:
        scale_n.mul_(weights_n)
    p_label_n1 = z_nV.gather(1, labels_n1) / total_n[:, None]
    z_nV.mul_((scale_n / total_n)[:, None])
    z_nV.scatter_(1, labels_n1, scale_n[:, None] * (p_label_n1 - 1))
    if tanh_nV is not None:
        z_nV.mul_(tanh_nV.square_().neg_().add_(1))
    if z_nV.data_ptr() != logits_nV.data_ptr():
        logits_nV.copy_(z_nV)


def _triton_softmax_step():
    from ft_dist_kernels.cross_entropy.kernels import softmax_step_triton

    return softmax_step_triton


def _product_dtype(hidden: Tensor, triton: bool) -> torch.dtype:
    """The dtype of the logits and of the matrix products."""
    widened = hidden.device.type == "cpu" and hidden.dtype.itemsize == 2 and not triton
    return torch.float32 if widened else hidden.dtype


def _rounds(head: Head, dtype: torch.dtype) -> bool:
    """Whether fp32 logits pass their gradient on in the weight's dtype, in which this CPU multiplies."""
    return head.weight.device.type == "cpu" and head.weight.dtype is not dtype and not widens(head.weight)


def _bytes_per_logit(head: Head, dtype: torch.dtype) -> int:
    if head.options.triton:
        return dtype.itemsize
    widened = 0 if dtype is torch.float32 else 4
    rounded = head.weight.dtype.itemsize if _rounds(head, dtype) else 0
    return dtype.itemsize + widened + rounded + (4 if head.options.softcap is not None else 0)


def _take(source_TH: Tensor, rows_N: Tensor | None, chunk: slice, dtype: torch.dtype) -> Tensor:
    taken = source_TH[chunk] if rows_N is None else source_TH.index_select(0, rows_N[chunk])
    return taken.to(dtype)


def _tiles(matrix_VH: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The matrix in `dtype`: whole on a GPU that need not widen it, otherwise tiles of rows, each widened over the one
    before."""
    vocabulary, width = matrix_VH.shape
    widened = matrix_VH.dtype is not dtype
    cpu = matrix_VH.device.type == "cpu"
    step = tile_rows(vocabulary, width, cpu=cpu, widened_item=dtype.itemsize if widened else 0)
    buffer = matrix_VH.new_empty(min(step, vocabulary), width, dtype=dtype) if widened else None
    for start in range(0, vocabulary, step):
        tile = slice(start, min(start + step, vocabulary))
        part = matrix_VH[tile]
        yield tile, part if buffer is None else buffer[: len(part)].copy_(part)


def _logits_into(logits_nV: Tensor, head: Head, hidden_nH: Tensor, source_nH: Tensor) -> Tensor | None:
    """Writes the raw logits (without bias) and returns S = source A^T if there is LoRA."""
    dtype = logits_nV.dtype
    s_nR = None if head.lora_a is None else source_nH @ head.lora_a.to(dtype).T
    for tile, weight_vH in _tiles(head.weight, dtype):
        tile_nv, weight_Hv = logits_nV[:, tile], weight_vH.T
        if s_nR is None or head.lora_b is None:
            matmul_into(tile_nv, hidden_nH, weight_Hv)
        else:  # the small term first: its rounding is small, and the sum is rounded once
            torch.mm(s_nR, head.lora_b[tile].to(dtype).T * head.options.lora_scale, out=tile_nv)
            tile_nv.addmm_(hidden_nH, weight_Hv)
    return s_nR


def _allocate(head: Head, hidden_TH: Tensor, count: int, wanted: Wanted) -> Gradients:
    def zeros(tensor: Tensor | None, want: bool) -> Tensor | None:
        if tensor is None or not want:
            return None
        return torch.zeros(tensor.shape, device=tensor.device, dtype=torch.float32)

    def rows(want: bool) -> Tensor | None:
        return hidden_TH.new_empty(count, hidden_TH.shape[1]) if want else None

    return Gradients(
        hidden=rows(wanted.hidden),
        weight=zeros(head.weight, wanted.weight),
        bias=zeros(head.bias, wanted.bias),
        lora_a=zeros(head.lora_a, wanted.lora_a),
        lora_b=zeros(head.lora_b, wanted.lora_b),
        lora_hidden=rows(wanted.lora_hidden),
    )


def _accumulate(
    grads: Gradients,
    d_nV: Tensor,
    rounded_nV: Tensor | None,
    head: Head,
    hidden_nH: Tensor,
    source_nH: Tensor,
    s_nR: Tensor | None,
    chunk: slice,
) -> None:
    """Adds the chunk's share, given the gradient over its raw logits (and that in the weight's dtype, if it is to be
    used), and writes its rows."""
    dtype, scale = d_nV.dtype, head.options.lora_scale
    own_source = source_nH is not hidden_nH
    d_hidden_nH = None
    if grads.hidden is not None and head.options.triton and (s_nR is None or own_source):
        torch.mm(d_nV, head.weight, out=grads.hidden[chunk])  # nothing is added: one rounding, in the product
    elif grads.hidden is not None:
        d_hidden_nH = product(d_nV, head.weight) if rounded_nV is None else (rounded_nV @ head.weight).float()
    if grads.weight is not None:
        add_product(grads.weight, d_nV.T, hidden_nH)
    if grads.bias is not None:
        grads.bias.add_(d_nV.sum(0, dtype=torch.float32))
    if s_nR is not None and head.lora_a is not None and head.lora_b is not None:
        if grads.lora_b is not None:
            add_product(grads.lora_b, d_nV.T, s_nR * scale)
        ds_nR = product(d_nV, head.lora_b.to(dtype)).mul_(scale)
        if ds_nR.device.type != "cpu":  # a GPU has no product of two dtypes
            ds_nR = ds_nR.to(dtype)
        if grads.lora_a is not None:
            add_product(grads.lora_a, ds_nR.T, source_nH)
        if own_source and grads.lora_hidden is not None:
            grads.lora_hidden[chunk].copy_(product(ds_nR, head.lora_a.to(dtype)))
        elif not own_source and d_hidden_nH is not None:
            add_product(d_hidden_nH, ds_nR, head.lora_a.to(dtype))
    if grads.hidden is not None and d_hidden_nH is not None:
        grads.hidden[chunk].copy_(d_hidden_nH)


def product(left: Tensor, right: Tensor) -> Tensor:
    """left right in fp32."""
    if left.dtype is right.dtype is torch.float32:
        return matmul(left, right)
    total = torch.zeros(left.shape[0], right.shape[1], device=left.device, dtype=torch.float32)
    add_product(total, left, right)
    return total


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left right, where `total` is fp32 and the factors may be in half precision.

    A partial product rounded to half precision before it is added costs accuracy: partial sums are larger than their
    total. cuBLAS adds into fp32 itself; torch has no such product on CPU, which widens tiles of the factors; ROCm does
    round, once for each chunk.
    """
    halves = left.dtype is right.dtype and left.dtype is not torch.float32
    if not halves and right.dtype is torch.float32:
        total.addmm_(left, right)
    elif halves and total.is_cuda and torch.version.hip is None:
        torch.ops.aten.addmm.dtype_out(total, left, right, torch.float32, out=total)
    elif halves and total.device.type != "cpu":
        total.add_(left @ right)
    else:
        for inner, right_tile in _tiles(right, torch.float32):
            total.addmm_(left[:, inner].float(), right_tile)
