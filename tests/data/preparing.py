"""Prepare a file in its own process, in small shards: `python -m tests.data.preparing FILE PLACE WORKERS [cache]`.

With `cache` the set goes to PLACE-cache/data, in a folder named by its fingerprint, as in a run.
"""

import sys
from unittest import mock

import ft_dist.data.prepare.build
import ft_dist.data.store.writer
from ft_dist.config.schema import DataConfig
from ft_dist.data.prepare.build import OnProgress
from tests.data.conftest import build_tokenizer

SHARD_TOKENS, CHUNK_RECORDS = 20_000, 40


def main(path: str, place: str, workers: str, where: str = "place", *, on_progress: OnProgress = print) -> None:
    data = DataConfig.model_validate({"train": [path], "cache_dir": f"{place}-cache"})
    tokenizer = build_tokenizer("chatml")
    with (
        mock.patch.object(ft_dist.data.store.writer, "SHARD_TOKENS", SHARD_TOKENS),
        mock.patch.object(ft_dist.data.prepare.build, "CHUNK_RECORDS", CHUNK_RECORDS),
    ):
        to = None if where == "cache" else place
        ft_dist.data.prepare.build.prepare(
            data.train, tokenizer, data=data, model_path="tiny", to=to, workers=int(workers), on_progress=on_progress
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
