"""Training from an object store: prepared into it and streamed from it, while the server is killed."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ft_dist.data.store.store import TokenStore
from tests.conftest import SMALL_RUN, read_lines, start_cli
from tests.data.store.test_store import write_set
from tests.object_store import ObjectStore, object_store

pytestmark = pytest.mark.faults

STEPS = 16
RUN = [*SMALL_RUN, f"optim.max_steps={STEPS}"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    with object_store(tmp_path_factory.mktemp("s3")) as store:
        yield store


@pytest.fixture(scope="module")
def small_shards(server: ObjectStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe's data prepared into the store and split there into hundreds of shards: more than are kept open."""
    with start_cli("prepare", *RUN, "--to", "s3://bucket/whole", **server.environment) as process:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, out + err
    whole = server.folder / "whole" / "train-0"
    store = TokenStore.open(whole)
    folder = tmp_path_factory.mktemp("sets") / "small"
    cut = write_set(folder, [store.sample(number) for number in range(len(store))], shard_tokens=1).index.model_dump()
    index = json.loads((whole / "index.json").read_text())
    del index["checksum"]
    (folder / "index.json").write_text(json.dumps(index | {"shards": cut["shards"], "lengths": cut["lengths"]}))
    for file in whole.iterdir():
        if file.name not in ("index.json", "lengths.safetensors") and not file.name.startswith("tokens-"):
            shutil.copy(file, folder)
    shutil.copytree(folder, server.folder / "small")
    return folder


@pytest.mark.parametrize("down_s", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_server_killed_during_training_only_delays_it(
    cli, server: ObjectStore, small_shards: Path, tmp_path: Path, down_s: float
) -> None:
    """Two ranks, a cache of a few shards, kill -9 on the server: the same samples and losses as from a local folder."""
    local = cli("train", *RUN, f"data.train={small_shards}", f"output_dir={tmp_path / 'local'}", "--nproc", "2")
    assert local.returncode == 0, local.stdout + local.stderr
    shard = max(entry["bytes"] for entry in json.loads((small_shards / "index.json").read_text())["shards"])
    arguments = [
        "data.train=s3://bucket/small",
        f"data.cache_bytes={20 * shard}",
        f"data.cache_dir={tmp_path / 'cache'}",
    ]
    arguments += [f"output_dir={tmp_path / 'remote'}", "--nproc", "2"]
    with start_cli("train", *RUN, *arguments, **server.environment) as run:
        metrics = tmp_path / "remote" / "metrics.jsonl"
        deadline = time.monotonic() + 300
        while not metrics.exists() or metrics.read_text().count("\n") < 3:
            assert run.poll() is None, run.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        server.kill()
        time.sleep(down_s)
        steps_while_down = metrics.read_text().count("\n")
        server.start()
        out, err = run.communicate(timeout=300)
    assert run.returncode == 0, out + err
    assert steps_while_down < STEPS, "it never needed the store again"
    output = out + (tmp_path / "remote" / "logs" / "rank-1.log").read_text()
    assert "retrying for up to" in output
    assert "answers again after" in output
    for name, keys in (("samples.jsonl", None), ("metrics.jsonl", ("step", "loss", "samples_seen"))):
        ours, theirs = (read_lines(tmp_path / place / name) for place in ("remote", "local"))
        assert len(ours) == STEPS
        for one, other in zip(ours, theirs, strict=True):
            assert (one == other) if keys is None else all(one[key] == other[key] for key in keys)
    lying = [path.stat().st_size for path in (tmp_path / "cache").rglob("tokens-*.safetensors")]
    assert 0 < sum(lying) <= 20 * shard


def test_faults_of_the_store_are_reported_before_training(cli, server: ObjectStore, tmp_path: Path) -> None:
    arguments = [*RUN, f"output_dir={tmp_path / 'run'}"]
    missing = cli("check", *arguments, "data.train=s3://bucket/nothing", **server.environment)
    assert missing.returncode == 2
    assert "s3://bucket/nothing: no index.json found, so it is not a prepared set." in missing.stderr
    refused = cli(
        "check", *arguments, "data.train=s3://bucket/nothing", **server.environment | {"AWS_SECRET_ACCESS_KEY": "wrong"}
    )
    assert refused.returncode == 2
    assert "not allowed to read" in refused.stderr
    assert "Traceback" not in missing.stderr + refused.stderr
