"""The loss is a sum divided by a count for any batching, and any number of ranks gives the same scores."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ft_dist_kernels.attention.segments import find_segments
from transformers import AutoModelForCausalLM

from ft_dist.data.read.formats import Sample
from ft_dist.data.stream.batch import MicroBatch
from ft_dist.evaluate.answers import as_text, exact_match
from ft_dist.evaluate.score import Scores, held_out_loss, labelled_prompts, score_answers
from ft_dist.model.tiny import byte_tokenizer, make_tiny


def micro_batch(labelled: int) -> MicroBatch:
    ids = torch.zeros(1, 8, dtype=torch.int64)
    segments = find_segments(ids)
    return MicroBatch(
        ids,
        ids,
        ids,
        torch.arange(8),
        segments,
        torch.arange(8),
        real_tokens=8,
        labelled_tokens=labelled,
        padded_tokens=0,
    )


def test_loss_weighs_tokens_not_batches() -> None:
    counts = [1, 99, 0]
    loss, tokens = held_out_loss(
        lambda batch: (
            torch.tensor(3.0 if batch.labelled_tokens == 1 else 1.0) * batch.labelled_tokens,
            batch.labelled_tokens,
        ),
        [micro_batch(count) for count in counts],
    )
    assert tokens == 100
    assert loss == pytest.approx((3.0 + 99.0) / 100)
    assert math.isnan(held_out_loss(lambda batch: (torch.tensor(0.0), 0), [micro_batch(0)])[0])


def test_loss_sums_in_double_precision() -> None:
    loss, _ = held_out_loss(
        lambda batch: (torch.tensor(1e8 if batch.labelled_tokens else 1.0), 1), [micro_batch(1)] + [micro_batch(0)] * 50
    )
    assert loss * 51 == pytest.approx(1e8 + 50, abs=1e-3)


def chat(*turns: tuple[str, str]) -> Sample:
    return Sample([{"role": role, "content": content} for role, content in turns], None, "here")


def test_only_conversations_that_end_with_an_answer_are_generated() -> None:
    tokenizer = byte_tokenizer()
    samples = [
        chat(("system", "sort"), ("user", "mail"), ("assistant", "spam")),
        chat(("user", "mail"), ("assistant", "spam"), ("user", "sure?")),
        Sample(None, "plain text", "here"),
    ]
    [prompt] = labelled_prompts(samples, tokenizer)
    assert (prompt.text, prompt.reference) == ("mail", "spam")
    assert tokenizer.decode(prompt.tokens).endswith("mail<|im_end|>\n<|im_start|>assistant\n")


def test_special_tokens_are_part_of_answer_and_reference() -> None:
    """A new token that the model has learnt counts, and one that it has not said does not."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<call>"], special_tokens=True)
    [prompt] = labelled_prompts([chat(("user", "mail"), ("assistant", "<call> lamps"))], tokenizer)
    [call] = tokenizer("<call>")["input_ids"]
    lamps = tokenizer(" lamps")["input_ids"]
    assert prompt.reference == "<call> lamps"
    stops = [tokenizer.eos_token_id]
    expected = as_text(tokenizer, prompt.expected, stops=stops)
    assert exact_match(as_text(tokenizer, [call, *lamps], stops=stops), expected)
    assert not exact_match(as_text(tokenizer, lamps, stops=stops), expected)


class Memorised:
    """A model that continues the prompt of each sample as the template renders the sample."""

    generation_config = None
    training = False

    def __init__(self, tokenizer: Any, samples: list[Sample]) -> None:
        self.eos = tokenizer.eos_token_id
        if tokenizer.chat_template is None:
            texts = ["".join(turn["content"] for turn in sample.messages or []) for sample in samples]
        else:
            texts = [tokenizer.apply_chat_template(sample.messages, tokenize=False) for sample in samples]
        self.texts = [tokenizer(text).input_ids for text in texts]

    def eval(self) -> None: ...

    def train(self, _: bool) -> None: ...

    def generate(self, input_ids: torch.Tensor, generation_config: Any, **_: Any) -> torch.Tensor:
        [prompt] = input_ids.tolist()
        [whole] = [text for text in self.texts if text[: len(prompt)] == prompt]
        made = [*whole[len(prompt) :], self.eos][: generation_config.max_new_tokens]
        return torch.tensor([prompt + made])


USER = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
TEMPLATES = {
    "special tokens around the answer": ("<|im_start|>assistant\n", "<resp>{{ m.content }}</resp>\n"),
    "empty reasoning": ("<|im_start|>assistant\n", "<think>\n\n</think>\n\n{{ m.content }}<|im_end|>\n"),
    "ends with words": ("### Answer:\n", "{{ m.content | trim }}\n### End\n"),
    "another prompt for the answer": ("<|im_start|>assistant\n<think>\n", "{{ m.content }}<|im_end|>\n"),
    "ChatML": ("<|im_start|>assistant\n", "{{ m.content }}<|im_end|>\n"),
}


def with_template(name: str) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<resp>", "</resp>", "<think>", "</think>"], special_tokens=True)
    prompt, answer = TEMPLATES[name]
    start = prompt.removesuffix("<think>\n")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}" + start + answer + "{% else %}" + USER + "{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}" + prompt + "{% endif %}"
    )
    return tokenizer


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "another prompt for the answer"])
def test_an_answer_as_the_template_renders_it_is_right(name: str) -> None:
    """The model learns to write it so; the reference alone would count as wrong."""
    tokenizer = with_template(name)
    samples = [chat(("user", user), ("assistant", said)) for user, said in (("sky", "blue"), ("grass", "green"))]
    prompts = labelled_prompts(samples, tokenizer)
    assert [prompt.reference for prompt in prompts] == ["blue", "green"]
    settings: dict[str, Any] = {"tokenizer": tokenizer, "max_new_tokens": 99, "batch_rows": 1, "device": "cpu"}
    assert score_answers(Memorised(tokenizer, samples), prompts, **settings).accuracy == 1.0
    swapped = [chat(("user", user), ("assistant", said)) for user, said in (("sky", "green"), ("grass", "green"))]
    assert score_answers(Memorised(tokenizer, swapped), prompts, **settings).accuracy == 0.5


def test_an_answer_that_does_not_follow_the_prompt_is_its_content() -> None:
    tokenizer = with_template("another prompt for the answer")
    [prompt] = labelled_prompts([chat(("user", "sky"), ("assistant", "blue"))], tokenizer)
    assert tokenizer.decode(prompt.expected) == "blue"


def test_a_completion_without_a_template() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    turns = [{"role": "user", "content": "The sky is "}, {"role": "assistant", "content": "blue."}]
    samples = [Sample(turns, None, "here", "prompt_completion")]
    prompts = labelled_prompts(samples, tokenizer)
    settings: dict[str, Any] = {"tokenizer": tokenizer, "max_new_tokens": 9, "batch_rows": 1, "device": "cpu"}
    assert score_answers(Memorised(tokenizer, samples), prompts, **settings).accuracy == 1.0


def test_non_finite_scores_are_valid_json() -> None:
    scores = Scores(loss=math.log(4), labelled_tokens=3)
    assert scores.to_dict()["perplexity"] == pytest.approx(4)
    assert scores.to_dict()["accuracy"] is None
    assert json.loads(json.dumps(Scores(1e9, 3).to_dict(), allow_nan=False))["perplexity"] is None
    assert json.loads(json.dumps(Scores(math.nan, 0).to_dict(), allow_nan=False))["loss"] is None


def answered(folder: str) -> dict[str, Any]:
    """The scores of seven prompts; half of the references equal the model's answers."""
    tokenizer = byte_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(folder)
    settings: dict[str, Any] = {"tokenizer": tokenizer, "max_new_tokens": 5, "batch_rows": 2, "device": "cpu"}
    samples = [chat(("user", "word " * number), ("assistant", "é")) for number in range(1, 8)]
    prompts = labelled_prompts(samples, tokenizer)
    first = score_answers(model, prompts, **settings)
    for number, example in enumerate(first.examples):
        if number % 2 == 0:
            object.__setattr__(prompts[number], "expected", tokenizer(example.answer)["input_ids"])
    again = score_answers(model, prompts, **settings)
    loss, tokens = held_out_loss(
        lambda batch: (torch.tensor(float(batch.labelled_tokens)) / 3, batch.labelled_tokens),
        [micro_batch(count) for count in range(1, 8)][(dist.get_rank() if dist.is_initialized() else 0) :: _world()],
    )
    return Scores(loss, tokens, again.accuracy, again.answered, again.examples).to_dict()


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _rank(rank: int, world: int, folder: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=world)
    Path(out, f"{rank}.json").write_text(json.dumps(answered(folder)))
    dist.destroy_process_group()


@pytest.mark.skipif(sys.platform == "win32", reason="gloo over a file store")
def test_two_ranks_agree_with_one(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    make_tiny("tiny-llama", model)
    alone = answered(str(model))
    assert alone["accuracy"] == pytest.approx(4 / 7)
    assert [example["correct"] for example in alone["examples"]] == [True, False] * 3 + [True]
    mp.spawn(_rank, args=(2, str(model), str(tmp_path)), nprocs=2)
    for rank in range(2):
        together = json.loads((tmp_path / f"{rank}.json").read_text())
        assert together.pop("loss") == pytest.approx(alone["loss"], rel=1e-12)
        assert together.pop("perplexity") == pytest.approx(alone["perplexity"], rel=1e-12)
        assert together == {key: value for key, value in alone.items() if key not in ("loss", "perplexity")}
