"""Greedy answers to batches of prompts, and whether an answer matches the reference."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ft_dist.model.quiet import quietly
from ft_dist.model.tokenizer import stop_token_ids

Progress = Callable[[int, int], None]
"""(prompts answered, prompts in total) on this rank"""
CutShort = Callable[[], bool]
"""Called after every generated token of a batch; True ends the batch on this rank with incomplete answers"""


def answer_prompts(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    tokenizer: Any,
    max_new_tokens: int,
    batch_rows: int,
    device: torch.device | str,
    synced: bool = False,
    progress: Progress | None = None,
    cut_short: CutShort | None = None,
) -> list[str]:
    """The model's greedy answers, in the order of `prompts` (token ids each).

    Prompts of similar length share a batch, longest first, so memory runs out in the first batch or never. An answer
    ends at any of `stop_token_ids` or after `max_new_tokens`. `synced` keeps a finished rank generating until all ranks
    have finished, which ZeRO-3 needs because each forward gathers weights; all ranks must then have the same number of
    batches. The model's training mode is restored afterwards.
    """
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    settings = _greedy(model, tokenizer, max_new_tokens)
    criteria = _stop_when(cut_short) if cut_short else None
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), quietly():
            for start in range(0, len(order), batch_rows):
                rows = order[start : start + batch_rows]
                inputs = _left_padded([prompts[index] for index in rows], settings.pad_token_id, device)
                output = model.generate(
                    **inputs, generation_config=settings, synced_gpus=synced, stopping_criteria=criteria
                )
                generated = output[:, inputs["input_ids"].shape[1] :].tolist()
                for index, ids in zip(rows, generated, strict=True):
                    answers[index] = as_text(tokenizer, ids, stops=settings.eos_token_id)
                if progress is not None:
                    progress(min(start + batch_rows, len(order)), len(order))
    finally:
        model.train(was_training)
    return answers


def stops_of(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end the model's answers."""
    own = getattr(model, "generation_config", None)
    return stop_token_ids(tokenizer, own.eos_token_id if own is not None else None)


def as_text(tokenizer: Any, ids: Sequence[int], *, stops: Sequence[int]) -> str:
    """The tokens before the first of `stops` as text, special ones included: `<call>` is part of an answer."""
    end = next((position for position, token in enumerate(ids) if token in stops), len(ids))
    return str(tokenizer.decode(ids[:end], skip_special_tokens=False))


def exact_match(answer: str, reference: str) -> bool:
    """Equality ignoring case, surrounding space and quotes, repeated space and trailing punctuation."""
    return _normalised(answer) == _normalised(reference)


def _normalised(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip(" \"'`*").rstrip(".,;:!? \"'`*").casefold()


def _greedy(model: Any, tokenizer: Any, max_new_tokens: int) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        use_cache=True,  # training disables it in the model's config
        eos_token_id=stops_of(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )


def _stop_when(cut_short: CutShort) -> Any:
    from transformers import StoppingCriteria, StoppingCriteriaList

    class WhenAsked(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.full((input_ids.shape[0],), cut_short(), device=input_ids.device, dtype=torch.bool)

    return StoppingCriteriaList([WhenAsked()])


def _left_padded(rows: list[Sequence[int]], pad_id: int, device: torch.device | str) -> dict[str, torch.Tensor]:
    """Each prompt must end where its answer begins, so padding is on the left."""
    width = max(len(row) for row in rows)
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for number, row in enumerate(rows):
        input_ids[number, width - len(row) :] = torch.tensor(row, dtype=torch.int64)
        attention_mask[number, width - len(row) :] = 1
    return {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device)}
