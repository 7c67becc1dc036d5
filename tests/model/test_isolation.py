"""Samples that share a packed row never see each other, in any architecture and attention backend."""

import pytest
import torch

from ft_dist.model.builtin import resolve_model
from ft_dist.model.tiny import tiny_names

LENGTHS = (13, 1, 30, 7)


def load(name: str, attention: str):
    from transformers import AutoModelForCausalLM

    folder = resolve_model(name)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()


CASES = [(name, attention) for name in tiny_names() for attention in ("sdpa", "eager")]
# transformers has no SDPA form of Gemma 2: its attention logits are soft-capped
CASES.remove(("tiny-gemma2", "sdpa"))


@pytest.mark.parametrize("name, attention", CASES)
def test_packed_logits_equal_the_samples_alone(name, attention):
    model = load(name, attention)
    generator = torch.Generator().manual_seed(1)
    samples = [torch.randint(0, 250, (1, length), generator=generator) for length in LENGTHS]
    padding = torch.zeros(1, 5, dtype=torch.long)
    row = torch.cat([*samples, padding], dim=1)
    positions = torch.cat([*(torch.arange(length) for length in LENGTHS), torch.zeros(5, dtype=torch.long)])[None]
    # two different rows in one batch: isolation must hold in each
    rows, positions = torch.cat([row, row.flip(1).roll(3)]), torch.cat([positions, torch.zeros_like(positions)])
    with torch.no_grad():
        packed = model(input_ids=rows, position_ids=positions, use_cache=False).logits[0]
        start = 0
        for sample in samples:
            own = model(input_ids=sample, use_cache=False).logits[0]
            torch.testing.assert_close(packed[start : start + sample.shape[1]], own, rtol=1e-5, atol=1e-5)
            start += sample.shape[1]


def test_a_model_without_the_mask_would_fail_this_test():
    """The test above can fail: if positions do not restart, the second sample sees the first."""
    model = load("tiny-llama", "sdpa")
    sample = torch.arange(20)[None]
    with torch.no_grad():
        own = model(input_ids=sample[:, 10:], use_cache=False).logits[0]
        mixed = model(input_ids=sample, use_cache=False).logits[0, 10:]
    assert (own - mixed).abs().max() > 1e-3
