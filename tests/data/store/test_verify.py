"""A local set is compared with its checksums before its first use, and again after a file is rewritten."""

import time
from pathlib import Path

import numpy as np
import pytest

from ft_dist.data.store import local
from ft_dist.data.store.store import TokenStore
from ft_dist.errors import DataError, StorageError
from ft_dist.storage import open_storage
from tests.data.store.test_store import random_samples, write_set


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    return write_set(tmp_path / "set", random_samples(60, 0), shard_tokens=200)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["tokens-00001.safetensors", "lengths.safetensors"])
def test_a_flipped_byte_is_found_before_it_is_used(store: TokenStore, tmp_path: Path, name: str) -> None:
    flip(tmp_path / "set" / name)
    with pytest.raises(DataError, match=rf"{name}: damaged \(its checksum is .*Delete .*set and prepare it again"):
        TokenStore.open(tmp_path / "set").gather(np.arange(60))


def test_a_shard_that_is_not_used_is_not_read(store: TokenStore, tmp_path: Path) -> None:
    flip(tmp_path / "set" / "tokens-00003.safetensors")
    TokenStore.open(tmp_path / "set").gather(np.arange(3))


def test_a_file_that_is_rewritten_during_training_is_found(
    store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "RECHECK_S", 0.05)
    ids = np.arange(60)
    store.expect(ids)
    store.gather(ids)
    flip(tmp_path / "set" / "tokens-00001.safetensors")
    deadline = time.monotonic() + 20

    def train() -> None:
        while time.monotonic() < deadline:
            store.gather(ids)
            time.sleep(0.02)

    with pytest.raises(DataError, match=r"tokens-00001\.safetensors: damaged"):
        train()
    store.close()


def test_a_file_that_is_touched_is_not_damaged(
    store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "RECHECK_S", 0.02)
    store.expect(np.arange(60))
    store.gather(np.arange(60))
    (tmp_path / "set" / "tokens-00001.safetensors").touch()
    time.sleep(0.3)
    store.gather(np.arange(60))
    store.close()
    assert not store._files._thread.is_alive()


def test_a_disk_that_fails_is_asked_again(store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read of a shared file system fails twice with ESTALE: the samples arrive. It fails on: one line."""
    storage = open_storage(tmp_path / "set", wait_s=10.0)
    again = TokenStore.open(storage)
    read, left = storage._files.read, [2]

    def failing(*arguments):
        if left[0] > 0:
            left[0] -= 1
            raise OSError(116, "Stale file handle")
        return read(*arguments)

    monkeypatch.setattr(storage._files, "read", failing)
    assert len(again.gather(np.arange(60))[2]) == 60
    assert left == [0]
    storage.wait_s, left[0] = 0.5, 1000
    again._files._intact.clear()
    again._shard.cache_clear()
    with pytest.raises(StorageError, match=r"tokens-00000\.safetensors: cannot read: .*Stale file handle"):
        again.gather(np.arange(60))
