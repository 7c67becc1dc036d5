"""Sets read from a real S3 server through a node's cache: killed servers, damage, several processes."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import ft_dist.data.store.cache as cache_module
import ft_dist.data.store.store as store_module
from ft_dist.data.store.cache import ShardCache, open_store
from ft_dist.data.store.store import TokenStore
from ft_dist.data.stream.mixture import MixtureSource
from ft_dist.data.stream.stream import DataStream
from ft_dist.errors import DataError, StorageError
from ft_dist.storage import open_storage, retry
from tests.data.store.test_store import write_set
from tests.object_store import ObjectStore, Proxy, Rule, fault_proxy, object_store

pytestmark = pytest.mark.faults

SAMPLES, SHARDS, TOKENS = 600, 12, 200
ROOMY = 10**8


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    with object_store(tmp_path_factory.mktemp("s3")) as store:
        yield store


@pytest.fixture
def proxy(server: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    monkeypatch.setattr(retry, "FIRST_DELAY_S", 0.05)
    with fault_proxy(server.port) as proxy:
        for name, value in proxy.environment.items():
            monkeypatch.setenv(name, value)
        yield proxy


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """600 samples of 200 tokens in twelve shards."""
    random = np.random.default_rng(0)
    samples = [(random.integers(0, 1000, TOKENS), random.random(TOKENS) < 0.5) for _ in range(SAMPLES)]
    return write_set(tmp_path_factory.mktemp("sets") / "set", samples, shard_tokens=TOKENS * SAMPLES // SHARDS)


@pytest.fixture
def url(server: ObjectStore, local: TokenStore, tmp_path: Path, proxy: Proxy) -> str:
    """The set in the object store, under a name that only this test uses."""
    url = f"{server.url}/{tmp_path.name}"
    remote = open_storage(url)
    assert isinstance(local.name, str)
    here = Path(local.name)
    for file in sorted(here.iterdir(), key=lambda file: file.name == "index.json"):
        remote.write(file.name, file)
    proxy.requests.clear()
    return url


def shard_bytes(local: TokenStore) -> int:
    return max(shard.bytes for shard in local.index.shards)


def fetches(proxy: Proxy, file: str) -> int:
    return len([request for request in proxy.requests if request.startswith("GET") and file in request])


def same_samples(one: TokenStore, other: TokenStore, ids: np.ndarray) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one.gather(ids), other.gather(ids), strict=True))


def test_a_cache_smaller_than_the_set_gives_every_sample(
    url: str, local: TokenStore, tmp_path: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "OPEN_SHARDS", 1)
    limit = 4 * shard_bytes(local)
    assert limit < local.nbytes / 2
    remote = open_store(url, cache=tmp_path / "cache", cache_bytes=limit, wait_s=30)
    for seed in range(3):
        ids = np.random.default_rng(seed).permutation(SAMPLES)
        remote.expect(ids)
        assert same_samples(remote, local, ids)
        lying = [path.stat().st_size for path in (tmp_path / "cache").glob("*/*.safetensors")]
        assert sum(lying) <= limit
    assert fetches(proxy, "tokens-") > SHARDS, "it went out and came again"
    remote.close()


def test_a_roomy_cache_fetches_each_file_once_over_restarts(
    url: str, local: TokenStore, tmp_path: Path, proxy: Proxy
) -> None:
    for _ in range(2):
        remote = open_store(url, cache=tmp_path / "cache", cache_bytes=ROOMY, wait_s=30)
        remote.expect(np.arange(SAMPLES))
        assert same_samples(remote, local, np.arange(SAMPLES)[::-1].copy())
        remote.close()
    assert [fetches(proxy, entry.file) for entry in local.index.shards] == [1] * SHARDS


@pytest.mark.parametrize("down_s", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_reads_survive_a_killed_server(
    url: str, server: ObjectStore, local: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, down_s: float
) -> None:
    monkeypatch.setattr(store_module, "OPEN_SHARDS", 1)
    lines: list[str] = []
    limit = 3 * shard_bytes(local)
    remote = open_store(url, cache=tmp_path / "cache", cache_bytes=limit, wait_s=120, log=lines.append)
    streams = [
        DataStream([MixtureSource("set", store)], seed=5, global_rows=4, max_length=512, packing=True)
        for store in (remote, local)
    ]
    waited_s = 0.0
    for step in range(40):
        if step == 10:
            server.kill()
            threading.Timer(down_s, server.start).start()
        here, there = (stream.next_batch() for stream in streams)
        assert here.rows == there.rows
        started = time.monotonic()
        assert same_samples(remote, local, np.array(here.sample_ids))
        waited_s = max(waited_s, time.monotonic() - started)
    remote.close()
    assert waited_s > down_s / 2, "the cache was too large for the test to mean anything"
    assert any("retrying" in line for line in lines)
    assert any("answers again" in line for line in lines)
    assert len(lines) <= 4 + 2 * down_s / 10, lines


@pytest.mark.parametrize("answer", [500, 503, "partial", "reset", "flip"])
def test_failed_and_damaged_downloads_are_retried(
    url: str, local: TokenStore, tmp_path: Path, proxy: Proxy, answer: int | str
) -> None:
    lines: list[str] = []
    proxy.rules = [Rule(r"GET .*tokens-0000[135]", answer, times=4 if answer != "flip" else 2)]  # type: ignore[arg-type]
    remote = open_store(url, cache=tmp_path / "cache", cache_bytes=ROOMY, wait_s=30, log=lines.append)
    assert same_samples(remote, local, np.arange(SAMPLES))
    assert proxy.rules[0].seen == proxy.rules[0].times
    if answer == "flip":
        assert "tokens-00001.safetensors: arrived damaged (checksum" in lines[0]
    remote.close()


@pytest.mark.parametrize("damage", ["truncated", "longer", "flipped", "missing"])
@pytest.mark.parametrize("file", ["tokens-00002.safetensors", "lengths.safetensors"])
def test_a_damaged_remote_file_is_named(url: str, server: ObjectStore, tmp_path: Path, damage: str, file: str) -> None:
    path = server.folder / tmp_path.name / file
    spoil(path, damage)
    with pytest.raises(DataError, match=rf"{url}/{file}: (damaged in the store|missing).*prepare the set again"):
        open_store(url, cache=tmp_path / "cache", cache_bytes=ROOMY, wait_s=30).gather(np.arange(SAMPLES))
    assert list((tmp_path / "cache").glob(f"*/{file}")) == []


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_damaged_cache_is_repaired_on_the_next_start(
    url: str, local: TokenStore, tmp_path: Path, proxy: Proxy, damage: str
) -> None:
    lines: list[str] = []
    options = {"cache": tmp_path / "cache", "cache_bytes": ROOMY, "wait_s": 30.0}
    open_store(url, **options).gather(np.arange(SAMPLES))
    cached = next((tmp_path / "cache").glob("*/tokens-00002.safetensors"))
    spoil(cached, damage)
    again = open_store(url, **options, log=lines.append)
    assert same_samples(again, local, np.arange(SAMPLES))
    assert fetches(proxy, "tokens-00002") == 2
    assert bool(lines) == (damage != "missing")
    assert all("tokens-00002.safetensors: damaged in the cache" in line for line in lines)


def spoil(path: Path, damage: str) -> None:
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "longer":
        path.write_bytes(content + b"0")
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


def test_a_changed_set_of_the_same_name_is_not_taken_from_the_cache(
    url: str, local: TokenStore, tmp_path: Path
) -> None:
    options = {"cache": tmp_path / "cache", "cache_bytes": ROOMY, "wait_s": 30.0}
    first = open_store(url, **options).sample(0)[0].tolist()
    write_set(tmp_path / "other", [([7, 8, 9], [True, True, True])], shard_tokens=1)
    for file in (tmp_path / "other").iterdir():
        open_storage(url).write(file.name, file)
    assert open_store(url, **options).sample(0)[0].tolist() == [7, 8, 9] != first


READER = """
import sys, numpy as np
from pathlib import Path
from ft_dist.data.store.cache import open_store
url, cache, limit, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
store = open_store(url, cache=cache, cache_bytes=limit, wait_s=60, log=print)
order = np.random.default_rng(seed).permutation(len(store))
store.expect(order)
total = 0
for start in range(0, len(order), 20):
    tokens, _, _ = store.gather(order[start : start + 20])
    total += int(tokens.sum())
print("sum", total, flush=True)
"""


def start_reader(url: str, cache: Path, limit: int, seed: int, proxy: Proxy) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", READER, url, str(cache), str(limit), str(seed)],
        env=os.environ | proxy.environment,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("roomy", [True, False])
def test_processes_share_one_cache(url: str, local: TokenStore, tmp_path: Path, proxy: Proxy, roomy: bool) -> None:
    limit = ROOMY if roomy else 4 * shard_bytes(local)
    readers = [start_reader(url, tmp_path / "cache", limit, seed, proxy) for seed in range(3)]
    expected = int(local.gather(np.arange(SAMPLES))[0].sum())
    for reader in readers:
        out, _ = reader.communicate(timeout=300)
        assert f"sum {expected}" in out
    if roomy:
        assert [fetches(proxy, entry.file) for entry in local.index.shards] == [1] * SHARDS


def test_a_process_killed_while_fetching_blocks_no_other(
    url: str, local: TokenStore, tmp_path: Path, proxy: Proxy
) -> None:
    proxy.rules = [Rule("GET .*tokens-", "hang", times=4)]
    with start_reader(url, tmp_path / "cache", ROOMY, 0, proxy) as reader:
        deadline = time.monotonic() + 60
        while not list((tmp_path / "cache").glob("*/.tokens-*.arriving")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.5)
        reader.kill()
    proxy.rules = []
    remote = open_store(url, cache=tmp_path / "cache", cache_bytes=ROOMY, wait_s=30)
    assert same_samples(remote, local, np.arange(SAMPLES))
    assert [path.name for path in (tmp_path / "cache").glob("*/.*") if ".lock" not in path.name] == []


def test_a_file_in_use_is_not_evicted(url: str, local: TokenStore, tmp_path: Path) -> None:
    files = [entry.file for entry in local.index.shards]
    limit = 2 * shard_bytes(local)
    options = {"cache_bytes": limit}
    mine = ShardCache(open_storage(url), tmp_path / "cache", **options)
    other = ShardCache(open_storage(url), tmp_path / "cache", **options)
    given = mine.path(files[0])
    for file in files[1:]:
        assert other.path(file).exists()
        assert given.exists()
    assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("*/*.safetensors")) <= limit
    mine.path(files[1])
    other.path(files[2])
    other.path(files[3])
    other.path(files[4])
    assert not given.exists()


def test_the_wait_limit_applies_once(url: str, tmp_path: Path, proxy: Proxy, local: TokenStore) -> None:
    """A prefetch is already waiting when the file is requested; the wait does not restart."""
    remote = open_store(url, cache=tmp_path / "cache", cache_bytes=ROOMY, wait_s=6)
    proxy.rules = [Rule(".", 503, times=10**6)]
    started = time.monotonic()
    remote.expect(np.arange(10))
    time.sleep(4)
    with pytest.raises(StorageError, match=r"tokens-00000.safetensors: cannot read: .*data.remote_wait_s \(6\)"):
        remote.gather(np.arange(10))
    assert 5 < time.monotonic() - started < 10, "it would take ten seconds if the wait restarted"


def test_closing_ends_a_wait(url: str, tmp_path: Path, proxy: Proxy) -> None:
    remote = open_store(url, cache=tmp_path / "cache", cache_bytes=ROOMY, wait_s=600)
    proxy.rules = [Rule(".", 503, times=10**6)]
    raised: list[Exception] = []

    def gather() -> None:
        try:
            remote.gather(np.arange(10))
        except StorageError as error:
            raised.append(error)

    thread = threading.Thread(target=gather)
    thread.start()
    time.sleep(0.5)
    remote.close()
    thread.join(timeout=10)
    assert len(raised) == 1


def test_an_invalid_set_is_reported(url: str, tmp_path: Path, local: TokenStore, server: ObjectStore) -> None:
    options = {"cache": tmp_path / "cache", "wait_s": 30.0}
    with pytest.raises(DataError, match=r"nothing: no index.json found"):
        open_store("s3://bucket/nothing", cache_bytes=ROOMY, **options)
    with pytest.raises(
        DataError, match=rf"data.cache_bytes=1000 is less than 2 .* Use at least {2 * shard_bytes(local)}"
    ):
        open_store(url, cache_bytes=1000, **options)
    index = server.folder / tmp_path.name / "index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"version": 1}))
    with pytest.raises(DataError, match="version 1"):
        open_store(url, cache_bytes=ROOMY, **options)
    index.write_text("{")
    with pytest.raises(DataError, match=r"index.json: not readable as JSON"):
        open_store(url, cache_bytes=ROOMY, **options)


def test_threads_of_one_process_fetch_a_file_once(url: str, local: TokenStore, tmp_path: Path, proxy: Proxy) -> None:
    assert cache_module.FETCH_THREADS > 1
    files = ShardCache(open_storage(url), tmp_path / "cache", cache_bytes=ROOMY)
    names = [entry.file for entry in local.index.shards]
    files.expect(names)
    threads = [threading.Thread(target=lambda: [files.path(name) for name in names]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert [fetches(proxy, name) for name in names] == [1] * SHARDS
