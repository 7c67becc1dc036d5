"""Score the model in training on `data.eval`, on all ranks, at any ZeRO stage."""

from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import Any

import numpy as np

from ft_dist.config.schema import RunConfig
from ft_dist.data.read.formats import read_samples
from ft_dist.data.store.store import SampleStore
from ft_dist.data.stream.batch import MicroBatch, collate
from ft_dist.distributed import Agreement, World
from ft_dist.engine.step import Engine
from ft_dist.evaluate.score import LabelledPrompt, Scores, held_out_loss, labelled_prompts, score_answers


class EvaluationStopped(Exception):  # noqa: N818 - not an error: a rank was asked to stop
    """Raised on all ranks before the same batch or, if they generate in lockstep, before the same token."""


class HeldOut:
    """The held-out set, tokenised once: rows for the loss and, on request, prompts to answer."""

    def __init__(self, config: RunConfig, store: SampleStore, prompts: list[LabelledPrompt]) -> None:
        self.settings = config.evaluate
        self.max_length = config.data.max_length
        self.store = store
        self.prompts = prompts

    @classmethod
    def prepare(cls, config: RunConfig, tokenizer: Any, store: SampleStore) -> "HeldOut":
        """`store` holds data.eval. Raises DataError if answers are requested and a source holds only tokens."""
        prompts: list[LabelledPrompt] = []
        if config.evaluate.generate:
            samples = chain.from_iterable(read_samples(source) for source in config.data.eval)
            prompts = labelled_prompts(islice(samples, config.evaluate.max_samples), tokenizer)
        return cls(config, store, prompts)

    def __len__(self) -> int:
        return min(len(self.store), self.settings.max_samples or len(self.store))

    def score(
        self, engine: Engine, tokenizer: Any, *, say: Callable[[str], None], stop_wanted: Callable[[], bool]
    ) -> Scores:
        """Each rank scores its share and gets the scores of the whole set. `say` prints progress.

        Raises EvaluationStopped on all ranks soon after `stop_wanted` returns true on any.
        """
        world = engine.world
        stopping = _Stopping(world, stop_wanted)
        loss, labelled = held_out_loss(
            lambda batch: (engine.loss_sum(batch), engine.objective.weight(batch)),
            stopping.between(self._batches(world, tokenizer.pad_token_id or 0, alone=engine.samples_alone)),
            device=world.device,
        )
        if not self.prompts:
            return Scores(loss=loss, labelled_tokens=labelled)

        def on_progress(done: int, total: int) -> None:
            say(f"answered {done * world.size} of {total * world.size} prompts")
            stopping.check(last=done == total)

        synced = engine.stage == 3 and world.size > 1

        def on_forward(*_: Any) -> None:
            engine.on_progress()
            if synced:
                # all ranks run the same forwards; finished ranks run them only so that others can gather weights
                stopping.check(last=False)

        hook = engine.objective.causal_lm.register_forward_pre_hook(on_forward)
        try:
            answered = score_answers(
                engine.objective.model,
                self.prompts,
                tokenizer=tokenizer,
                max_new_tokens=self.settings.max_new_tokens,
                batch_rows=self.settings.batch_rows,
                device=world.device,
                synced=synced,
                progress=on_progress,
                cut_short=None if synced else stop_wanted,
            )
        finally:
            hook.remove()
        return Scores(
            loss=loss,
            labelled_tokens=labelled,
            accuracy=answered.accuracy,
            answered=answered.answered,
            examples=answered.examples,
        )

    def _batches(self, world: World, pad_id: int, *, alone: bool) -> Iterator[MicroBatch]:
        """Batches of rows of similar length; the same number on every rank, as ZeRO-3 needs."""
        by_length = np.argsort(-self.store.lengths_of(np.arange(len(self))), kind="stable").tolist()
        mine = by_length[world.data_rank :: world.data_size]
        rows = 1 if alone else self.settings.batch_rows
        share = -(-len(by_length) // world.data_size)
        gpu_length = self.max_length if world.device.type == "cuda" else None
        for start in range(0, share, rows):
            samples = [[index] for index in mine[start : start + rows]]
            yield collate(samples, self.store, pad_id=pad_id, gpu_length=gpu_length)


class _Stopping:
    """Passes a rank's stop request to all ranks between batches."""

    def __init__(self, world: World, wanted: Callable[[], bool]) -> None:
        self._agreement, self._wanted = Agreement(world), wanted

    def check(self, *, last: bool) -> None:
        """`last`: no call follows, so this one waits for its result."""
        agreed = self._agreement.ask(self._wanted())
        if last:
            agreed = self._agreement.settle() or agreed
        if agreed:
            self._agreement.settle()
            raise EvaluationStopped

    def between(self, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        for batch in batches:
            self.check(last=False)
            yield batch
        self.check(last=True)
