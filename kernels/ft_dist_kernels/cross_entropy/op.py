"""Hidden states and the head's weight to the summed loss (or to per-token log-probs), without T x V logits.

    raw  = hidden weight^T + bias + lora_scale (lora_hidden lora_a^T) lora_b^T
    z    = softcap tanh(logit_scale raw / softcap), or logit_scale raw without a cap
    lse  = log sum_v exp(z_v)
    loss = sum over labelled t of w_t (lse - z_label)

Rows whose label is `ignore_index` are dropped before the first matrix product. The rest go through the head in chunks;
each chunk's logits are turned into their own gradient in place, so the gradients of every input are complete when the
forward pass ends and the backward pass only multiplies them by the upstream scalar. Sums over rows run chunk after
chunk in fp32: no atomics, the same bits every run.

Shapes: T tokens (any leading shape), N labelled tokens, n rows of a chunk, H hidden, V vocabulary, R LoRA rank.
Sources: Liger-Kernel (arXiv 2410.10989) for the gradient in the forward pass, Cut Cross-Entropy (arXiv 2411.09009) for
dropping ignored rows, Milakov and Gimelshein (arXiv 1805.02867) for the online log-sum-exp, Gemma 2 (arXiv 2408.00118)
for the soft-cap.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ft_dist_kernels.aot import AotCase, Chip
from ft_dist_kernels.backend import Backend, use_triton
from ft_dist_kernels.cross_entropy.chunks import input_gradients, run_chunks
from ft_dist_kernels.cross_entropy.types import Head, Options, Wanted


class LinearCrossEntropyOutput(NamedTuple):
    """`loss`: fp32 scalar, the differentiable sum. The rest carry no gradient: `nll` is the plain fp32 sum of
    -log p(label) without weights; `tokens` (int64) counts the labelled tokens; `correct`
    (int64) counts those whose label has the highest logit (a tie counts)."""

    loss: Tensor
    nll: Tensor
    tokens: Tensor
    correct: Tensor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    token_weights: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    lora_scale: float = 1.0,
    lora_hidden: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    rows: Tensor | None = None,
    backend: Backend = "auto",
) -> LinearCrossEntropyOutput:
    """Cross-entropy of a linear head, summed over the labelled tokens.

    hidden (..., H) and weight (V, H) share a floating dtype (under autocast both are cast); labels (...) are integers
    already shifted by the caller. bias (V,), lora_a (R, H), lora_b (V, R) and token_weights (...) may have their own
    floating dtype; token_weights carry no gradient. lora_hidden (..., H) is the input of the LoRA branch if it is
    not `hidden` itself (dropout). Under no_grad, or if no input requires a gradient, no gradient is computed.

    rows (N,) int64 are the flat indices of the labelled tokens, if the caller knows them; the loss covers these.
    Without it the host waits for the GPU to find them.

    Without a labelled token the loss is 0 and every gradient is zero. A label that is neither `ignore_index` nor in
    [0, V) raises ValueError on CPU; on a GPU, where a check would stall the queue, it makes the loss and the gradients
    of its row NaN.
    """
    _validate(hidden, weight, labels, bias, lora_a, lora_b, lora_hidden, lora_scale, softcap, logit_scale)
    if token_weights is not None:
        if token_weights.shape != labels.shape:
            raise ValueError(
                f"token_weights has shape {tuple(token_weights.shape)} and labels {tuple(labels.shape)}; pass one "
                "weight per label."
            )
        if token_weights.requires_grad:
            raise ValueError("token_weights.requires_grad=True, but weights carry no gradient. Pass .detach() of them.")
    if rows is not None and (rows.dim() != 1 or rows.dtype != torch.int64 or rows.numel() > labels.numel()):
        raise ValueError(
            f"rows is {rows.dtype} {tuple(rows.shape)}; it must be int64 of shape (N,), N at most {labels.numel()}."
        )
    options = Options(lora_scale, softcap, logit_scale, use_triton(hidden, backend))
    tensors = (hidden, weight, bias, lora_a, lora_b, lora_hidden)
    return LinearCrossEntropyOutput(
        *_run(_LinearCrossEntropy, tensors, options, labels, token_weights, ignore_index, rows)
    )


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    lora_scale: float = 1.0,
    lora_hidden: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    backend: Backend = "auto",
) -> Tensor:
    """log p(label) of every token in fp32, with labels' shape; 0 where the label is `ignore_index`.

    Differentiable: the backward pass recomputes the logits chunk by chunk. Arguments as in `linear_cross_entropy`.
    """
    _validate(hidden, weight, labels, bias, lora_a, lora_b, lora_hidden, lora_scale, softcap, logit_scale)
    options = Options(lora_scale, softcap=softcap, logit_scale=logit_scale, triton=use_triton(hidden, backend))
    tensors = (hidden, weight, bias, lora_a, lora_b, lora_hidden)
    return _run(_LinearLogProbs, tensors, options, labels, None, ignore_index, None)


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    token_weights: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    lora_scale: float = 1.0,
    lora_hidden: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
) -> LinearCrossEntropyOutput:
    """The same in plain PyTorch with full logits: what a model does without this op."""
    z = _reference_logits(hidden, weight, bias, lora_a, lora_b, lora_scale, lora_hidden, softcap, logit_scale)
    labelled = labels != ignore_index
    target = labels.masked_fill(~labelled, 0).long()
    lse = z.logsumexp(-1)
    z_label = z.gather(-1, target[..., None]).squeeze(-1)
    per_token = lse - z_label
    if token_weights is not None:
        per_token = per_token * token_weights.to(per_token.dtype)
    nll = (lse - z_label).detach().masked_fill(~labelled, 0).sum()
    correct = (labelled & (z_label >= z.amax(-1))).sum()
    return LinearCrossEntropyOutput(per_token.masked_fill(~labelled, 0).sum(), nll, labelled.sum(), correct)


def linear_log_probs_reference(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """`linear_log_probs` in plain PyTorch with full logits."""
    ignore_index = options.pop("ignore_index", -100)
    scalars = {"lora_scale": 1.0, "logit_scale": 1.0}
    names = ("bias", "lora_a", "lora_b", "lora_scale", "lora_hidden", "softcap", "logit_scale")
    chosen: dict[str, Any] = {name: options.get(name, scalars.get(name)) for name in names}
    z = _reference_logits(hidden, weight, **chosen)
    labelled = labels != ignore_index
    target = labels.masked_fill(~labelled, 0).long()
    log_probs = z.log_softmax(-1).gather(-1, target[..., None]).squeeze(-1)
    return log_probs.masked_fill(~labelled, 0)


def _reference_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    lora_scale: float,
    lora_hidden: Tensor | None,
    softcap: float | None,
    logit_scale: float,
) -> Tensor:
    raw = torch.nn.functional.linear(hidden, weight)
    if bias is not None:
        raw = raw + bias.to(raw.dtype)
    if lora_a is not None and lora_b is not None:
        source = hidden if lora_hidden is None else lora_hidden
        raw = raw + lora_scale * (source @ lora_a.to(raw.dtype).T) @ lora_b.to(raw.dtype).T
    z = raw.to(torch.promote_types(raw.dtype, torch.float32)) * logit_scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def _validate(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    lora_hidden: Tensor | None,
    lora_scale: float,
    softcap: float | None,
    logit_scale: float,
) -> None:
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be (..., H) and (V, H) with one H. "
            "Under ZeRO-3 gather the weight first."
        )
    vocabulary, width = weight.shape
    if vocabulary < 1:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: the vocabulary must hold at least one entry.")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}; hidden {tuple(hidden.shape)} needs {tuple(hidden.shape[:-1])}. "
            "Shift and trim both before the call."
        )
    if labels.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise ValueError(f"labels has dtype {labels.dtype}; labels are integers. Use labels.long().")
    if hidden.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"hidden has dtype {hidden.dtype}; it must be fp32, bf16 or fp16. Use hidden.float().")
    if not torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden is {hidden.dtype} and weight {weight.dtype}; outside autocast they must agree. Cast hidden with "
            f".to({weight.dtype})."
        )
    if (lora_a is None) != (lora_b is None):
        raise ValueError("lora_a and lora_b come together: pass both or neither.")
    if lora_hidden is not None and (lora_a is None or lora_hidden.shape != hidden.shape):
        raise ValueError(
            f"lora_hidden has shape {tuple(lora_hidden.shape)}; it needs lora_a and lora_b, and hidden's shape "
            f"{tuple(hidden.shape)}."
        )
    rank = 0 if lora_a is None else lora_a.shape[0]
    expected = {
        "bias": (bias, (vocabulary,)),
        "lora_a": (lora_a, (rank, width)),
        "lora_b": (lora_b, (vocabulary, rank)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; this head needs {shape}.")
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap={softcap} must be finite and > 0. Use None for no cap.")
    for name, value in (("logit_scale", logit_scale), ("lora_scale", lora_scale)):
        if not math.isfinite(value):
            raise ValueError(f"{name}={value} must be finite. Use 1.0 for none.")


@torch._disable_dynamo
def _run(
    function: type[torch.autograd.Function],
    tensors: tuple[Tensor | None, ...],
    options: Options,
    labels: Tensor,
    token_weights: Tensor | None,
    ignore_index: int,
    rows: Tensor | None,
) -> Any:
    hidden, weight, bias, lora_a, lora_b, lora_hidden = tensors
    assert hidden is not None
    assert weight is not None
    device, dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    lora_hidden = None if lora_hidden is None else lora_hidden.to(dtype)
    with torch.autocast(device, enabled=False):
        return function.apply(
            hidden, weight, bias, lora_a, lora_b, lora_hidden,
            options, labels, token_weights, ignore_index, rows, torch.is_grad_enabled(),
        )  # fmt: skip


def _labelled_rows(
    labels: Tensor, ignore_index: int, vocabulary: int, rows_N: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """(indices of the labelled tokens, or None if all are labelled; their labels)."""
    labels_T = labels.reshape(-1)
    if rows_N is None:  # the one wait for the GPU
        rows_N = (labels_T != ignore_index).nonzero().squeeze(1)
    labels_N = (labels_T if rows_N.numel() == labels_T.numel() else labels_T[rows_N]).long()
    if labels_N.device.type == "cpu" and labels_N.numel():
        low, high = (int(bound) for bound in labels_N.aminmax())
        if low < 0 or high >= vocabulary:
            raise ValueError(
                f"label {low if low < 0 else high} is outside [0, {vocabulary}) and is not ignore_index="
                f"{ignore_index}. Set it to ignore_index, or give the head as many rows as the tokenizer has tokens."
            )
    return (None if rows_N.numel() == labels_T.numel() else rows_N), labels_N


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        lora_hidden: Tensor | None,
        options: Options,
        labels: Tensor,
        token_weights: Tensor | None,
        ignore_index: int,
        rows: Tensor | None,
        with_grad: bool,
    ) -> tuple[Tensor, ...]:
        rows_N, labels_N = _labelled_rows(labels, ignore_index, weight.shape[0], rows)
        weights_N = None
        if token_weights is not None:
            weights_N = token_weights.reshape(-1).float()
            weights_N = weights_N if rows_N is None else weights_N[rows_N]
        wanted = Wanted(*ctx.needs_input_grad[:6]) if with_grad else Wanted()
        head = Head(weight, bias, lora_a, lora_b, options)
        tokens, grads = run_chunks(head, hidden, lora_hidden, rows_N, labels_N, weights_N, wanted)
        if any(wanted):
            ctx.save_for_backward(hidden, weight, bias, lora_a, lora_b, lora_hidden, labels_N, weights_N)
            ctx.options, ctx.wanted, ctx.grads, ctx.rows_N, ctx.shape = options, wanted, grads, rows_N, hidden.shape
            ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (weight, bias, lora_a, lora_b)]
        outputs = (
            tokens.loss.sum(),
            tokens.nll.sum(),
            torch.full((), labels_N.numel(), dtype=torch.int64, device=labels.device),
            tokens.correct.sum(dtype=torch.int64),
        )
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Hands over the gradients of the forward pass, so that a trained head never holds two gradients of its weight;
        a second backward through a retained graph recomputes them. Only that reads the saved tensors, because under
        activation checkpointing reading them costs another forward pass."""
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            hidden, weight, bias, lora_a, lora_b, lora_hidden, labels_N, weights_N = ctx.saved_tensors
            with torch.autocast(hidden.device.type, enabled=False):
                head = Head(weight, bias, lora_a, lora_b, ctx.options)
                _, grads = run_chunks(head, hidden, lora_hidden, ctx.rows_N, labels_N, weights_N, ctx.wanted)
        return input_gradients(grads, ctx.rows_N, ctx.shape, ctx.dtypes, grad_loss)


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        lora_hidden: Tensor | None,
        options: Options,
        labels: Tensor,
        token_weights: Tensor | None,
        ignore_index: int,
        rows: Tensor | None,
        with_grad: bool,
    ) -> Tensor:
        rows_N, labels_N = _labelled_rows(labels, ignore_index, weight.shape[0], rows)
        head = Head(weight, bias, lora_a, lora_b, options)
        tokens, _ = run_chunks(head, hidden, lora_hidden, rows_N, labels_N, None, Wanted())
        ctx.save_for_backward(hidden, weight, bias, lora_a, lora_b, lora_hidden, rows_N, labels_N)
        ctx.options = options
        log_probs_N = tokens.nll.neg_()
        if rows_N is None:
            return log_probs_N.view(labels.shape)
        return log_probs_N.new_zeros(labels.numel()).index_copy_(0, rows_N, log_probs_N).view(labels.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor) -> tuple[Tensor | None, ...]:
        """The result is the gradient of the loss whose token weights are minus the upstream gradient."""
        hidden, weight, bias, lora_a, lora_b, lora_hidden, rows_N, labels_N = ctx.saved_tensors
        weights_N = grad_log_probs.reshape(-1).float()
        weights_N = (weights_N if rows_N is None else weights_N[rows_N]).neg()
        with torch.autocast(hidden.device.type, enabled=False):
            head, wanted = Head(weight, bias, lora_a, lora_b, ctx.options), Wanted(*ctx.needs_input_grad[:6])
            _, grads = run_chunks(head, hidden, lora_hidden, rows_N, labels_N, weights_N, wanted)
        dtypes = [None if tensor is None else tensor.dtype for tensor in (weight, bias, lora_a, lora_b)]
        return input_gradients(grads, rows_N, hidden.shape, dtypes, None)


def aot_cases(chip: Chip) -> list[AotCase]:
    """The kernel at the vocabularies of Llama 3, Gemma and SmolLM2, bf16."""
    from ft_dist_kernels.cross_entropy.kernels import aot_cases as cases

    return cases(chip)
