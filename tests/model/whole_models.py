"""Whole models and a packed batch, to compare the losses and gradients of two ways to run them."""

import torch
from ft_dist_kernels.attention.segments import find_segments

from ft_dist.method.lora import Lora
from ft_dist.model.builtin import resolve_model
from ft_dist.model.fused.fuse import fuse
from ft_dist.model.load import enable_activation_checkpointing
from ft_dist.model.parts.layers import layers_of
from ft_dist.objective.causal import CausalObjective


def build(name, kernels, *, method=None, dtype=torch.float32, checkpointing=False, nonzero=True):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(resolve_model(name), dtype=dtype)
    if checkpointing:
        enable_activation_checkpointing(model)
    if method is not None:
        model = fitting(method, model).adapt(model, layers_of(model))
        for parameter_name, parameter in model.named_parameters():
            if nonzero and "lora_B" in parameter_name:
                # B starts at zero, which would hide every error in A's gradient
                torch.nn.init.normal_(parameter, std=0.05)
    causal_lm = model.get_base_model() if method is not None else model
    report = fuse(causal_lm, kernels=kernels, device_type="cpu", zero3=False)
    objective = CausalObjective(model, fused=report.head_backend, by_segment=report.segments)
    report.add_head(objective.head.reason_unfused())
    return objective.train(), report


def fitting(method, model):
    """`method` without the target modules that `model` does not have."""
    if method.target_modules == "all-linear":
        return method
    leaves = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return method.model_copy(update={"target_modules": [name for name in method.target_modules if name in leaves]})


def batch(rows=2, width=32, restart=20):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 250, (rows, width + 1), generator=generator)
    labels = ids[:, 1:].clone()
    labels[:, :9] = -100
    positions = torch.arange(width).repeat(rows, 1)
    positions[:, restart:] -= restart
    rows_of = {"input_ids": ids[:, :-1].contiguous(), "labels": labels, "position_ids": positions}
    kept = torch.arange(rows * width)
    return rows_of | {"kept": kept, "segments": find_segments(positions), "labelled": kept[labels.view(-1) != -100]}


def gradients(objective, **size):
    loss = objective(**batch(**size))
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in objective.named_parameters() if p.grad is not None}


def assert_same(ours, truth, *, relative=2e-5):
    """Check that our (loss, gradients by name) differ from the truth by no more than the order of fp32 sums
    explains."""
    (loss, grads), (true_loss, true_grads) = ours, truth
    torch.testing.assert_close(loss, true_loss, rtol=1e-5, atol=0)
    assert grads.keys() == true_grads.keys()
    for name, grad in true_grads.items():
        assert (grads[name] - grad).norm() <= relative * grad.norm() + 1e-7, name


METHODS = {
    "full": None,
    "lora": Lora(rank=4, alpha=8),
    "rslora": Lora(rank=4, alpha=8, rslora=True),
    "dora": Lora(rank=4, alpha=8, dora=True),
    "head": Lora(rank=4, alpha=8, target_modules=["q_proj", "qkv_proj", "down_proj", "lm_head"]),
}
