"""Fine-tuning in plain PyTorch, the reference for ft_dist's step. It shares no code with ft_dist: one sample per
forward, no padding, no packing, gradients summed and divided once by the labelled tokens of the step. A bf16 model
computes in bf16, with master weights and gradient sums in fp32."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F


def labelled(messages: list[dict[str, str]], tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and targets of a ChatML conversation that ends with the assistant's turn."""
    head = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages[:-1])
    prompt = tokenizer(f"{head}<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    answer = tokenizer(f"{messages[-1]['content']}<|im_end|>", add_special_tokens=False)["input_ids"]
    tail = tokenizer("\n", add_special_tokens=False)["input_ids"]
    labels = [-100] * len(prompt) + answer + [-100] * len(tail)
    return torch.tensor([prompt + answer + tail]), torch.tensor(labels)


def plain_losses(
    model: Any, tokenizer: Any, data: Path, steps: list[list[int]], rates: list[float], max_norm: float
) -> list[tuple[float, float]]:
    """(loss, gradient norm before clipping) of every step; `steps` holds the sample ids of each."""
    samples = [labelled(json.loads(line)["messages"], tokenizer) for line in data.read_text().splitlines()]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    masters = [parameter.detach().float().clone() for parameter in trained]
    optimizer = torch.optim.AdamW(masters, lr=0.0, weight_decay=0.0)
    results = []
    for ids, rate in zip(steps, rates, strict=True):
        total = torch.zeros(())
        count = sum(int((samples[index][1] != -100).sum()) for index in ids)
        for index in ids:
            tokens, labels = samples[index]
            logits = model(input_ids=tokens).logits[0].float()
            loss = F.cross_entropy(logits[:-1], labels[1:], reduction="sum", ignore_index=-100)
            grads = torch.autograd.grad(loss / count, trained)
            for master, grad in zip(masters, grads, strict=True):
                master.grad = grad.float() if master.grad is None else master.grad + grad.float()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(masters, max_norm)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for parameter, master in zip(trained, masters, strict=True):
                parameter.copy_(master)
        results.append((float(total) / count, float(norm)))
    return results
