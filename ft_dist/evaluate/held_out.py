"""`data.eval` scored with the model that is being trained, on all ranks, at any ZeRO stage."""

from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import Any

import numpy as np

from ft_dist.config.schema import RunConfig
from ft_dist.data.batch import MicroBatch, collate
from ft_dist.data.formats import read_samples
from ft_dist.data.prepare import prepare
from ft_dist.data.store import SampleStore
from ft_dist.distributed import World
from ft_dist.engine.step import Engine
from ft_dist.evaluate.score import LabelledPrompt, Scores, held_out_loss, labelled_prompts, score_answers


class HeldOut:
    """Held-out samples, tokenised once: rows for the loss and, if asked for, prompts to answer."""

    def __init__(self, config: RunConfig, store: SampleStore, prompts: list[LabelledPrompt]) -> None:
        self.settings = config.evaluate
        self.store = store
        self.prompts = prompts

    @classmethod
    def prepare(cls, config: RunConfig, tokenizer: Any) -> "HeldOut":
        """Raises DataError as preparing the training data does."""
        store = prepare(config.data.eval, tokenizer, data=config.data, model_path=config.model.path).store
        prompts: list[LabelledPrompt] = []
        if config.evaluate.generate:
            samples = chain.from_iterable(read_samples(source) for source in config.data.eval)
            prompts = labelled_prompts(islice(samples, config.evaluate.max_samples), tokenizer)
        return cls(config, store, prompts)

    def __len__(self) -> int:
        return min(len(self.store), self.settings.max_samples or len(self.store))

    def score(self, engine: Engine, tokenizer: Any, *, say: Callable[[str], None]) -> Scores:
        """Every rank takes its share and gets the scores of all. `say` hears how far answering is."""
        world = engine.world
        loss, labelled = held_out_loss(
            lambda batch: (engine.loss_sum(batch), batch.labelled_tokens),
            self._batches(world, tokenizer.pad_token_id or 0),
            device=world.device,
        )
        if not self.prompts:
            return Scores(loss=loss, labelled_tokens=labelled)
        answered = score_answers(
            engine.objective.model,
            self.prompts,
            tokenizer=tokenizer,
            max_new_tokens=self.settings.max_new_tokens,
            batch_rows=self.settings.batch_rows,
            device=world.device,
            synced=engine.stage == 3 and world.size > 1,
            progress=lambda done, total: say(f"answered {done * world.size} of {total * world.size} prompts"),
        )
        return Scores(
            loss=loss,
            labelled_tokens=labelled,
            accuracy=answered.accuracy,
            answered=answered.answered,
            examples=answered.examples,
        )

    def _batches(self, world: World, pad_id: int) -> Iterator[MicroBatch]:
        """Rows of like length together; the same number of batches on every rank, as ZeRO-3 needs."""
        by_length = np.argsort(-self.store.lengths_of(np.arange(len(self))), kind="stable").tolist()
        mine = by_length[world.rank :: world.size]
        rows = self.settings.batch_rows
        share = -(-len(by_length) // world.size)
        for start in range(0, share, rows):
            yield collate([[index] for index in mine[start : start + rows]], self.store, pad_id=pad_id)
