"""One run, from one place at a time, writes to a mirror."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ft_dist.checkpoint.commit import format as layout
from ft_dist.checkpoint.commit import lease as lease_module
from ft_dist.checkpoint.commit.lease import RECORD, Lease, read_record, remote_steps
from ft_dist.checkpoint.find import find
from ft_dist.errors import CheckpointError, ConfigError, StorageError
from ft_dist.storage import open_storage


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, value in {"RENEW_S": 0.1, "LEASE_S": 0.6, "WATCH_S": 0.05, "SETTLE_S": 0.05}.items():
        monkeypatch.setattr(lease_module, name, value)


@pytest.fixture
def storage(tmp_path):
    return open_storage(tmp_path / "mirror", wait_s=1)


def take(storage, run_id, output_dir):
    lease = Lease(storage, run_id=run_id, output_dir=str(output_dir))
    lease.take(say=print)
    return lease


def test_a_released_store_is_taken_at_once(storage, tmp_path):
    first = take(storage, None, tmp_path / "a")
    assert first.held
    first.release()
    assert read_record(storage).holder is None
    moved = take(storage, first.run_id, tmp_path / "moved")
    assert moved.held
    moved.release()


def test_another_run_is_refused(storage, tmp_path):
    first = take(storage, None, tmp_path / "a")
    first.release()
    for run_id in (None, "another"):
        with pytest.raises(ConfigError, match=r"holds the run of output_dir=.*a, not the one in output_dir=.*b\."):
            take(storage, run_id, tmp_path / "b")
    assert read_record(storage).run_id == first.run_id


def test_an_empty_folder_of_the_same_name_continues_the_run(storage, tmp_path):
    first = take(storage, None, tmp_path / "a")
    first.release()
    again = take(storage, None, tmp_path / "a")
    assert again.run_id == first.run_id
    again.release()


def test_a_store_in_use_elsewhere_is_refused(storage, tmp_path):
    holder = take(storage, "run", tmp_path / "a")
    with pytest.raises(ConfigError, match=r"is in use by output_dir=.*a on .*, pid \d+"):
        take(storage, "run", tmp_path / "copy of a")
    assert holder.held
    holder.release()


def test_a_killed_holder_blocks_nobody(storage, tmp_path):
    """Its own folder at once: the folder's lock shows that it is gone. Another folder once it does not renew."""
    program = (
        "import sys, os\nfrom ft_dist.checkpoint.commit.lease import Lease\nfrom ft_dist.storage import open_storage\n"
        "lease = Lease(open_storage(sys.argv[1]), run_id='run', output_dir=sys.argv[2])\n"
        "lease.take(say=print)\nos.kill(os.getpid(), 9)\n"
    )
    command = [sys.executable, "-c", program, storage.url, str(tmp_path / "a")]
    for folder in (tmp_path / "a", tmp_path / "b"):
        done = subprocess.run(command, env=os.environ, check=False)
        assert done.returncode == -9
        assert read_record(storage).holder is not None
        take(storage, "run", folder).release()


def test_who_was_replaced_writes_no_more(storage, tmp_path):
    paused = take(storage, "run", tmp_path / "a")
    record = json.loads(storage.read_bytes(RECORD))
    record["holder"]["token"] = "of another process"
    storage.write(RECORD, json.dumps(record).encode())
    paused._thread.join(5)
    assert not paused.held
    assert "taken over" in paused.lost
    paused.release()
    assert read_record(storage).holder.token == "of another process"


def test_copies_without_a_record_belong_to_the_run_in_their_config(storage, tmp_path):
    folder = Path(storage.url) / layout.step_name(3)
    folder.mkdir(parents=True)
    state = {"step": 3, "config": {"output_dir": str(tmp_path / "a")}}
    files = {layout.STATE: layout.write_synced(folder / layout.STATE, json.dumps(state))}
    layout.write_manifest(folder, 3, files)
    for run_id in (None, "a run that began without a mirror"):
        with pytest.raises(ConfigError, match="holds the run of output_dir="):
            take(storage, run_id, tmp_path / "b")
    take(storage, None, tmp_path / "a").release()


@pytest.mark.parametrize("text", [b"", b"{}", b"[" * 100_000, b'{"run_id": 3, "output_dir": "x"}', b"\xff"])
def test_a_damaged_record_is_reported(storage, tmp_path, text):
    storage.write(RECORD, text)
    with pytest.raises(StorageError, match=r"run\.json: "):
        take(storage, None, tmp_path / "a")
    shutil.rmtree(storage.url)


def test_never_refuses_the_copies_of_the_run_before(storage, tmp_path, monkeypatch):
    """Its first restart would otherwise resume from them."""
    folder = Path(storage.url) / layout.step_name(3)
    folder.mkdir(parents=True)
    layout.write_manifest(folder, 3, {layout.STATE: layout.write_synced(folder / layout.STATE, '{"step": 3}')})
    with pytest.raises(CheckpointError, match=r"checkpoint\.resume=never, but .*mirror holds copies"):
        find(resume="never", root=tmp_path / "checkpoints", storage=storage)


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_a_mirror_that_cannot_be_listed_is_not_empty(storage, tmp_path, monkeypatch, number):
    (tmp_path / "mirror/step-00000003").mkdir(parents=True)

    def refuse(place):
        raise OSError(number, os.strerror(number), place)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(StorageError):
        remote_steps(open_storage(tmp_path / "mirror", wait_s=0.1))
