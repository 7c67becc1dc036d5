"""Open the training data that the config names: a mixture of prepared sets, or one live source."""

from typing import Any

from ft_dist.config import RunConfig
from ft_dist.data.prepare.build import Prepared
from ft_dist.data.stream.batch import BatchStream
from ft_dist.data.stream.live import LiveStream
from ft_dist.data.stream.stream import DataStream


def open_stream(config: RunConfig, tokenizer: Any, train_set: Prepared, *, packing: bool | None = None) -> BatchStream:
    """Global batches of the prepared sets, or of the live source. `packing`: samples share rows; None:
    as `data.packing` says."""
    data, rows = config.data, config.batch.global_rows
    packs = data.packs if packing is None else packing
    if data.live:
        return LiveStream(data.live, tokenizer, data=data, seed=config.seed, global_rows=rows, packing=packs)
    return DataStream(
        train_set.sources,
        seed=config.seed,
        global_rows=rows,
        max_length=data.max_length,
        packing=packs,
        temperature=data.temperature,
        shuffle_samples=data.shuffle_samples,
        curriculum=data.curriculum,
    )
