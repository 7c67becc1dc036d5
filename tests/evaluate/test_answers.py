"""Batched, padded answers equal those of one prompt at a time, and matching ignores only formatting."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ft_dist.evaluate.answers import answer_prompts, exact_match
from ft_dist.model.tiny import make_tiny

DEVICE = "cpu"


@pytest.fixture(scope="module", params=["tiny-llama", "tiny-gemma3"])
def model_and_tokenizer(request, tmp_path_factory) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp(request.param)
    make_tiny(request.param, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.use_cache = False  # the state after training
    return model, AutoTokenizer.from_pretrained(folder)


def greedy_by_hand(model: Any, ids: list[int], stops: set[int], count: int) -> list[int]:
    """One prompt, one full forward per token, no cache and no padding."""
    made: list[int] = []
    while len(made) < count:
        with torch.no_grad():
            token = int(model(torch.tensor([ids + made])).logits[0, -1].argmax())
        if token in stops:
            break
        made.append(token)
    return made


def test_batches_agree_with_one_at_a_time(model_and_tokenizer: tuple[Any, Any]) -> None:
    model, tokenizer = model_and_tokenizer
    prompts = [tokenizer(text).input_ids for text in ("a", "some longer prompt here " * 4, "mid length", "zz")]
    expected = [tokenizer.decode(greedy_by_hand(model.eval(), ids, {259}, 10)) for ids in prompts]
    settings = {"tokenizer": tokenizer, "max_new_tokens": 10, "device": DEVICE}
    model.train()
    for batch_rows in (1, 3, 8):
        assert answer_prompts(model, prompts, batch_rows=batch_rows, **settings) == expected
    assert model.training
    assert answer_prompts(model, [], batch_rows=2, **settings) == []


def test_an_answer_ends_at_any_stop_token(model_and_tokenizer: tuple[Any, Any]) -> None:
    model, tokenizer = model_and_tokenizer
    model.eval()
    ids = tokenizer("stop here").input_ids
    free = greedy_by_hand(model, ids, set(), 10)
    end = next(index for index, token in enumerate(free) if index and token not in free[:index])
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [free[end]]
    try:
        [answer] = answer_prompts(model, [ids], tokenizer=tokenizer, max_new_tokens=10, batch_rows=1, device=DEVICE)
    finally:
        model.generation_config.eos_token_id = before
    assert answer == tokenizer.decode(free[:end])


@pytest.mark.parametrize("answer", ["spam", " Spam.", "SPAM\n", '"spam"', "**spam**", "spam!"])
def test_formatting_is_ignored(answer: str) -> None:
    assert exact_match(answer, "spam")


@pytest.mark.parametrize("answer", ["", "spam or order", "This is spam", "spa m", "3.5"])
def test_content_is_not(answer: str) -> None:
    assert not exact_match(answer, "spam")
    assert exact_match("The  answer\nis 3.5.", "the answer is 3.5")
