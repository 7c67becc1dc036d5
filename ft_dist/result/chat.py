"""Chat with a finished run or any model in the terminal; answers are streamed.

Ctrl-C ends an answer, Ctrl-D or `exit` the conversation. `prompt` answers once, for scripts.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from ft_dist.config import RunConfig
from ft_dist.errors import DataError

if TYPE_CHECKING:
    from ft_dist.checkpoint.find import Step
    from ft_dist.result.load import Finished

Messages = list[dict[str, Any]]
Write = Callable[[str], None]


def chat(
    path: str,
    *,
    step: "Step | None" = None,
    prompt: str | None = None,
    system: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    trust_remote_code: bool = False,
) -> None:
    """Chat with `path` (see `trained_weights`); temperature 0 always picks the likeliest token.

    `system` None uses the run's system prompt, if its training samples share one. Raises ModelError.
    """
    from ft_dist.result.load import load_finished

    finished = load_finished(path, step=step, trust_remote_code=trust_remote_code, progress=_say)
    for note in finished.notes:
        _say(note)
    if system is None and finished.config is not None:
        system = _trained_system_prompt(finished.config)
        if system:
            _say(f"system prompt, from the training data: {system}")
    talk = Conversation(finished, system=system, max_new_tokens=max_new_tokens, temperature=temperature)
    if prompt is not None:
        talk.answer(prompt, _print)
        _print("\n")
        return
    if sys.stdin.isatty():
        _say("Ctrl-C stops an answer, Ctrl-D or exit quits.")
    for turn in _turns():
        talk.answer(turn, _print)
        _print("\n")


class Conversation:
    """A model, the conversation so far, and the sampling options."""

    def __init__(
        self, finished: "Finished", *, system: str | None = None, max_new_tokens: int = 512, temperature: float = 0.0
    ) -> None:
        self._model, self._tokenizer = finished.model, finished.tokenizer
        self._temperature = temperature
        self._max_new_tokens = max_new_tokens
        self.messages: Messages = [{"role": "system", "content": system}] if system else []
        self._first = len(self.messages)

    def answer(self, text: str, write: Write) -> str:
        """The answer to `text`, passed to `write` piece by piece. After Ctrl-C the partial answer is kept."""
        import torch
        from transformers import TextIteratorStreamer

        self.messages.append({"role": "user", "content": text})
        ids = torch.tensor([self._prompt()], device=self._model.device)
        streamer = TextIteratorStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)
        stop, errors = threading.Event(), []

        def generate() -> None:
            try:
                self._generate(ids, streamer, stop)
            except BaseException as error:  # raised in the reading thread, which would otherwise wait forever
                errors.append(error)
                streamer.end()

        worker = threading.Thread(target=generate, name="chat-generate", daemon=True)
        worker.start()
        pieces = []
        try:
            for piece in streamer:
                pieces.append(piece)
                write(piece)
        except KeyboardInterrupt:
            stop.set()
        worker.join()
        if errors:
            raise errors[0]
        answer = "".join(pieces).strip()
        self.messages.append({"role": "assistant", "content": answer})
        return answer

    def _generate(self, ids: Any, streamer: Any, stop: threading.Event) -> None:
        import torch
        from transformers import GenerationConfig, StoppingCriteriaList

        from ft_dist.model.quiet import quietly

        own = self._model.generation_config
        sampling = {"do_sample": True, "temperature": self._temperature} if self._temperature else {"do_sample": False}
        settings = GenerationConfig(
            max_new_tokens=self._max_new_tokens,
            eos_token_id=own.eos_token_id,
            pad_token_id=own.pad_token_id,
            use_cache=True,
            **sampling,
        )

        def stopped(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.full((input_ids.shape[0],), stop.is_set(), device=input_ids.device)

        with torch.no_grad(), quietly():
            self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=settings,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([stopped]),
            )

    def _prompt(self) -> list[int]:
        """Token ids of the conversation; the oldest turns are dropped when the model's positions run out."""
        from ft_dist.data.encode.template import encode_prompt

        limit = getattr(self._model.config, "max_position_embeddings", None)
        while True:
            ids = encode_prompt(self.messages, self._tokenizer)
            fits = limit is None or len(ids) + self._max_new_tokens <= limit
            if fits or len(self.messages) <= self._first + 2:
                return ids
            del self.messages[self._first : self._first + 2]


def _trained_system_prompt(config: RunConfig) -> str | None:
    """The system prompt of the first training samples, if they all have the same."""
    from ft_dist.data.read.formats import read_samples

    prompts = set()
    try:
        for sample in islice(read_samples(config.data.train[0]), 32):
            first = (sample.messages or [{}])[0]
            prompts.add(first.get("content") if first.get("role") == "system" else None)
    except DataError:  # the training data may have moved
        return None
    return prompts.pop() if len(prompts) == 1 else None


def _turns() -> Iterator[str]:
    """The user's input, one line per turn, until the end of input or `exit`."""
    interactive = sys.stdin.isatty()
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except (EOFError, KeyboardInterrupt):
            _print("\n" if interactive else "")
            return
        if line in ("exit", "quit"):
            return
        if line:
            yield line


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
