"""Held-out loss and accuracy over all ranks. Numbers and text are exchanged as tensors; nothing is pickled."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from ft_dist.data.encode.label_spans import Messages
from ft_dist.data.encode.template import Encoded, Encoder
from ft_dist.data.read.formats import Sample
from ft_dist.data.stream.batch import MicroBatch
from ft_dist.evaluate.answers import CutShort, Progress, answer_prompts, as_text, exact_match, stops_of

EXAMPLES = 8
_EXAMPLE_BYTES = 2048


@dataclass(frozen=True, slots=True)
class LabelledPrompt:
    """A question with a known answer: token ids of the prompt, the text of the last user turn, the reference."""

    tokens: list[int]
    text: str
    reference: str
    expected: list[int]
    """Token ids of the reference as the model learns to write it, with what the template adds (reasoning marks, an end
    token)"""


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt with the model's answer."""

    prompt: str
    answer: str
    reference: str
    correct: bool


@dataclass(frozen=True, slots=True)
class Answered:
    """Exact matches over the prompts of all ranks, and the first few examples in data order."""

    accuracy: float | None
    answered: int
    examples: list[Example]


@dataclass(slots=True)
class Scores:
    """Scores on held-out data. `loss` is the mean over the objective's units (`labelled_tokens` of them) in nats;
    accuracy is None if nothing was generated."""

    loss: float
    labelled_tokens: int
    accuracy: float | None = None
    answered: int = 0
    examples: list[Example] = field(default_factory=list)

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite on overflow."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf

    def to_dict(self) -> dict[str, Any]:
        """As JSON values: a perplexity or loss that is not finite becomes None."""
        tree = asdict(self)
        tree["perplexity"] = self.perplexity
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in tree.items()
        }


def held_out_loss(
    objective: Callable[[MicroBatch], tuple[torch.Tensor, torch.Tensor | int]],
    batches: Iterable[MicroBatch],
    *,
    device: torch.device | str = "cpu",
) -> tuple[float, int]:
    """(mean loss in nats, total weight) over all ranks: sums in float64, divided once.

    `objective` returns a micro-batch's summed loss and its weight (labelled tokens, for causal training). Under ZeRO-3
    every rank must have the same number of batches; a dummy adds nothing. A total weight of 0 gives NaN.
    """
    total = torch.zeros(2, dtype=torch.float64, device=device)
    with torch.no_grad():
        for batch in batches:
            loss_sum, count = objective(batch)
            total[0] += loss_sum.detach().to(total)
            total[1] += count
    _add_over_ranks(total)
    loss_sum, count = total.tolist()
    return (loss_sum / count if count else math.nan), int(count)


def labelled_prompts(samples: Iterable[Sample], tokenizer: Any) -> list[LabelledPrompt]:
    """Prompts of the samples that can be answered: conversations that end with the assistant's turn."""
    encoder = Encoder(tokenizer)
    chosen = [sample for sample in samples if _ends_with_answer(sample.messages or [])]
    prompts = []
    for sample, encoded in zip(chosen, encoder.encode_batch(chosen), strict=True):
        *before, last = sample.messages or []
        reference = str(last["content"])
        tokens = encoder.encode_prompt(before, sample.tools)
        expected = _answer_after(tokens, encoded)
        if not expected:
            # the text after the prompt is no label, or the two share a token
            expected = list(tokenizer(reference, add_special_tokens=False)["input_ids"])
        prompts.append(LabelledPrompt(tokens, str(before[-1].get("content", "")), reference, expected))
    return prompts


def _ends_with_answer(messages: Messages) -> bool:
    return len(messages) > 1 and messages[-1]["role"] == "assistant"


def _answer_after(prompt: list[int], sample: Encoded) -> list[int]:
    """The labelled tokens of a sample that starts with `prompt`; none if it does not."""
    start = len(prompt)
    if sample.tokens[:start].tolist() != prompt:
        return []
    return sample.tokens[start:][sample.mask[start:]].tolist()


def score_answers(
    model: Any,
    prompts: Sequence[LabelledPrompt],
    *,
    tokenizer: Any,
    max_new_tokens: int,
    batch_rows: int,
    device: torch.device | str,
    synced: bool = False,
    progress: Progress | None = None,
    cut_short: CutShort | None = None,
) -> Answered:
    """Answer every prompt on one of the ranks and compare. Every rank must call this with the same prompts.

    Rank r answers prompts r, r + world, ...; ranks with one prompt fewer answer the first prompt again, so that all
    generate the same number of batches, as ZeRO-3 needs.
    """
    if not prompts:
        return Answered(None, 0, [])
    rank, world = (dist.get_rank(), dist.get_world_size()) if _joined() else (0, 1)
    mine = list(range(rank, len(prompts), world))
    share = -(-len(prompts) // world)
    dummies = share - len(mine)
    answers = answer_prompts(
        model,
        [prompts[index].tokens for index in [*mine, *[0] * dummies]],
        tokenizer=tokenizer,
        max_new_tokens=max_new_tokens,
        batch_rows=batch_rows,
        device=device,
        synced=synced,
        progress=progress,
        cut_short=cut_short,
    )
    stops = stops_of(model, tokenizer)
    right = {
        index: exact_match(answer, as_text(tokenizer, prompts[index].expected, stops=stops))
        for index, answer in zip(mine, answers, strict=False)
    }
    return _gather(prompts, dict(zip(mine, answers, strict=False)), right, device)


def _gather(
    prompts: Sequence[LabelledPrompt], answers: dict[int, str], right: dict[int, bool], device: torch.device | str
) -> Answered:
    """Each rank fills in its own results and leaves zeros elsewhere; a sum gives all ranks the full results."""
    correct = torch.zeros(len(prompts), dtype=torch.int64, device=device)
    shown = min(EXAMPLES, len(prompts))
    text = torch.zeros(shown, _EXAMPLE_BYTES, dtype=torch.int32, device=device)
    for index, answer in answers.items():
        correct[index] = int(right[index])
        if index < shown:
            data = answer.encode()[:_EXAMPLE_BYTES]
            text[index, : len(data)] = torch.tensor(list(data), dtype=torch.int32)
    _add_over_ranks(correct)
    _add_over_ranks(text)
    examples = []
    for index in range(shown):
        answer = bytes(text[index].tolist()).rstrip(b"\0").decode(errors="ignore")
        prompt = prompts[index]
        examples.append(Example(prompt.text, answer, prompt.reference, bool(correct[index])))
    return Answered(float(correct.sum()) / len(prompts), len(prompts), examples)


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def _add_over_ranks(tensor: torch.Tensor) -> None:
    if _joined():
        dist.all_reduce(tensor)
