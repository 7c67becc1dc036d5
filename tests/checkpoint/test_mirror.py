"""Copies of commits on a real S3 server with planned failures: no commit is lost, and no partial one is read."""

import json
import shutil
import threading

import pytest
import torch

from ft_dist.checkpoint.commit import format as layout
from ft_dist.checkpoint.commit import mirror as mirror_module
from ft_dist.checkpoint.commit.lease import Lease, remote_steps
from ft_dist.checkpoint.commit.mirror import Mirror, fetch, upload
from ft_dist.checkpoint.commit.retention import Retention
from ft_dist.checkpoint.commit.snapshot import HostBuffer
from ft_dist.checkpoint.find import newest_intact
from ft_dist.errors import StorageError
from ft_dist.storage import open_storage
from tests.object_store import Rule, environment, fault_proxy, object_store

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with object_store(tmp_path_factory.mktemp("s3")) as store:
        yield store


@pytest.fixture
def proxy(server, monkeypatch):
    with fault_proxy(server.port) as proxy:
        for key, value in environment(proxy.port).items():
            monkeypatch.setenv(key, value)
        yield proxy


@pytest.fixture
def place(proxy, server, request):
    """A separate folder in the bucket: its URL, and the folder that stores its objects as files."""
    name = request.node.name.replace("[", "-").replace("]", "").replace(" ", "-")
    return f"{server.url}/{name}", server.folder / name


def commit(root, step):
    folder = layout.step_folder(root, step)
    folder.mkdir(parents=True)
    tensors = {"master/w@0": torch.full((50_000,), float(step))}
    files = {layout.rank_name(0): HostBuffer(torch.device("cpu")).snapshot(tensors).write(folder / layout.rank_name(0))}
    files[layout.STATE] = layout.write_synced(folder / layout.STATE, json.dumps({"step": step}))
    layout.write_manifest(folder, step, files)
    return layout.Commit(folder, step)


def mirror_of(storage, retention):
    return Mirror(storage, retention, Lease(storage, run_id="a run", output_dir="runs/x"))


def test_a_lost_disk_loses_nothing(tmp_path, place):
    storage = open_storage(place[0], wait_s=20)
    mirror = mirror_of(storage, Retention(keep=2))
    for step in (1, 2, 3):
        mirror.offer(commit(tmp_path / "local", step), losses={})
    mirror.close()
    assert {(event.name, event.step) for event in mirror.new_events()} >= {("mirrored", 3)}
    assert remote_steps(storage)[-1] == 3
    assert len(remote_steps(storage)) <= 2
    shutil.rmtree(tmp_path / "local")
    found, skipped = newest_intact(tmp_path / "local", storage)
    assert (found.step, skipped) == (3, [])
    layout.verify(found)


@pytest.mark.parametrize(
    "rule",
    [
        Rule("PUT .*rank", 503, times=3),
        Rule("PUT .*manifest", 500, times=3),
        Rule("PUT .*state", "lose", times=2),
        Rule("GET .*rank", 503, times=3),
        Rule("GET .*rank", "partial", times=2),
    ],
    ids=["503 on put", "500 on put", "put unanswered", "503 on get", "partial get"],
)
def test_temporary_failures_are_retried_and_reported(tmp_path, proxy, place, rule):
    lines = []
    storage = open_storage(place[0], wait_s=30, log=lines.append)
    rule.seen = 0
    proxy.rules.append(rule)
    upload(commit(tmp_path / "local", 7), storage)
    found = fetch(storage, 7, tmp_path / "fetched")
    layout.verify(found)
    assert rule.seen == rule.times
    # the driver itself retries a broken connection once or twice without reporting it
    assert any("retrying" in line for line in lines) or not isinstance(rule.answer, int)
    assert same_files(found.folder, tmp_path / "local" / found.folder.name)


def same_files(one, two):
    return all((one / path.name).read_bytes() == path.read_bytes() for path in two.iterdir())


def test_a_store_that_stays_down_loses_the_copy_only(tmp_path, proxy, place):
    storage = open_storage(place[0], wait_s=1)
    proxy.rules.append(Rule(".", 503, times=10**6))
    mirror = mirror_of(storage, Retention(keep=2))
    local = commit(tmp_path / "local", 1)
    mirror.offer(local, losses={})
    mirror.close()
    (event,) = mirror.new_events()
    assert event.name == "mirror_failed"
    assert str(local.folder) in event.note
    # the local commit is used, and the store's failure is reported
    found, skipped = newest_intact(tmp_path / "local", storage)
    assert found.step == 1
    assert storage.url in skipped[0]
    # without a local commit the run must not start over as if the store were empty
    with pytest.raises(StorageError):
        newest_intact(tmp_path / "empty", storage)
    proxy.rules.clear()
    again = mirror_of(storage, Retention(keep=2))
    again.offer(local, losses={})
    again.close()
    assert remote_steps(storage) == [1]


def test_half_an_upload_is_no_commit(tmp_path, place):
    storage = open_storage(place[0], wait_s=20)
    upload(commit(tmp_path / "local", 1), storage)
    half = commit(tmp_path / "local", 2)
    for path in half.folder.iterdir():
        if path.name != layout.MANIFEST:
            storage.write(f"{half.folder.name}/{path.name}", path)
    assert remote_steps(storage) == [1]


@pytest.mark.parametrize(
    "file, damage",
    [
        *((layout.rank_name(0), damage) for damage in ("flip", "cut", "delete", "other")),
        (layout.STATE, "flip"),
        (layout.STATE, "delete"),
        (layout.MANIFEST, "cut"),
        (layout.MANIFEST, "delete"),
        (layout.MANIFEST, "other"),
    ],
)
def test_damage_in_the_store_is_reported_and_the_previous_commit_used(tmp_path, place, file, damage):
    url, folder = place
    storage = open_storage(url, wait_s=20)
    for step in (1, 2):
        upload(commit(tmp_path / "local", step), storage)
    path = folder / layout.step_name(2) / file
    content = bytearray(path.read_bytes())
    if damage == "delete":
        path.unlink()
    elif damage == "other":
        shutil.copy(folder / layout.step_name(1) / file, path)
    elif damage == "cut":
        path.write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    found, skipped = newest_intact(tmp_path / "fresh", storage)
    assert found.step == 1
    if (file, damage) != (layout.MANIFEST, "delete"):
        assert len(skipped) == 1
        assert "step-00000002" in skipped[0]
    assert [kept.step for kept in layout.commits(tmp_path / "fresh")] == [1]


def test_a_damaged_local_commit_is_downloaded_again(tmp_path, place):
    storage = open_storage(place[0], wait_s=20)
    local = commit(tmp_path / "local", 4)
    upload(local, storage)
    (local.folder / layout.STATE).write_text("{}")
    found, skipped = newest_intact(tmp_path / "local", storage)
    assert found.step == 4
    layout.verify(found)
    assert len(skipped) == 1
    assert (tmp_path / "local" / "step-00000004.damaged").is_dir()


def test_milestones_are_uploaded_in_order(tmp_path, place, monkeypatch):
    started, release = threading.Event(), threading.Event()
    real = mirror_module.upload

    def slow(commit, storage):
        started.set()
        release.wait(30)
        real(commit, storage)

    monkeypatch.setattr(mirror_module, "upload", slow)
    mirror = mirror_of(open_storage(place[0], wait_s=20), Retention(keep=1, every_steps=2))
    for step in (1, 2, 3, 4, 5):
        mirror.offer(commit(tmp_path, step), losses={})
        assert started.wait(30)
    assert mirror.unfinished() == {1, 2, 4, 5}
    release.set()
    mirror.close()
    assert [event.step for event in mirror.new_events()] == [1, 2, 4, 5]
    assert remote_steps(mirror.storage) == [2, 4, 5]
