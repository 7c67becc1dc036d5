"""`ft-dist checkpoint verify` reads every byte of a run's commits, and of their copies in an object store."""

import json
import time

import pytest
import torch

from ft_dist.checkpoint.commit import format as layout
from ft_dist.checkpoint.commit.mirror import upload
from ft_dist.checkpoint.commit.snapshot import HostBuffer
from ft_dist.storage import open_storage
from tests.object_store import environment, object_store
from tests.ports import free_port


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with object_store(tmp_path_factory.mktemp("s3")) as store:
        yield store


def commit(root, step):
    folder = layout.step_folder(root, step)
    folder.mkdir(parents=True)
    # more than one ranged read
    tensors = {"master/w@0": torch.full((5_000_000,), float(step))}
    files = {layout.rank_name(0): HostBuffer(torch.device("cpu")).snapshot(tensors).write(folder / layout.rank_name(0))}
    files[layout.STATE] = layout.write_synced(folder / layout.STATE, json.dumps({"step": step}))
    layout.write_manifest(folder, step, files)
    return layout.Commit(folder, step)


def test_copies_in_an_object_store(cli, tmp_path, server, monkeypatch):
    for key, value in server.environment.items():
        monkeypatch.setenv(key, value)
    storage = open_storage(f"{server.url}/mine/copies", wait_s=20)
    for step in (1, 2, 3):
        upload(commit(tmp_path / "local", step), storage)
    intact = cli("checkpoint", "verify", storage.url)
    assert (intact.returncode, intact.stderr) == (0, "")
    assert intact.stdout.splitlines() == [f"{storage.url}/step-0000000{step}: intact" for step in (1, 2, 3)]

    objects = server.folder / "mine" / "copies"
    flipped, gone = objects / "step-00000001" / layout.rank_name(0), objects / "step-00000002" / layout.STATE
    content = bytearray(flipped.read_bytes())
    content[-1] ^= 1
    flipped.write_bytes(content)
    gone.unlink()
    damaged = cli("checkpoint", "verify", f"{storage.url}/", "--json")
    assert damaged.returncode == 2
    one, two, three = json.loads(damaged.stdout)
    where = f"{storage.url}/step-00000001/{layout.rank_name(0)}"
    assert one["problem"] == f"{where}: its checksum is not the committed one."
    assert two["problem"].startswith(f"{storage.url}/step-00000002/{layout.STATE}: not found")
    assert three == {"folder": f"{storage.url}/step-00000003", "step": 3, "problem": None}

    alone = cli("checkpoint", "verify", three["folder"])
    assert alone.stdout == f"{three['folder']}: intact\n"
    flipped.write_bytes(content[:-1])
    cut = cli("checkpoint", "verify", one["folder"])
    assert cut.returncode == 2
    assert "were committed" in cut.stdout


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_commits_on_a_disk(cli, tmp_path, scheme):
    folder = commit(tmp_path / "copies", 7).folder
    done = cli("checkpoint", "verify", f"{scheme}{tmp_path / 'copies'}")
    assert (done.returncode, done.stdout) == (0, f"{folder}: intact\n")
    (folder / layout.STATE).write_text("{}")
    assert cli("checkpoint", "verify", f"{scheme}{folder}").returncode == 2


@pytest.mark.parametrize("url", ["s3://bucket/empty", "nope://bucket/empty"])
def test_a_url_without_a_checkpoint(cli, server, url):
    done = cli("checkpoint", "verify", url, **server.environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"ft-dist: error: {url}: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.faults
def test_a_store_that_does_not_answer(cli):
    started = time.monotonic()
    done = cli("checkpoint", "verify", "s3://bucket/copies", **environment(free_port()))
    assert done.returncode == 2
    assert time.monotonic() - started < 120
    *waiting, last = done.stderr.splitlines()
    assert "retrying" in waiting[0]
    assert last.endswith("Check the endpoint and the network.")
