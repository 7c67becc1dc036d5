"""A folder is a commit if and only if it has a manifest, and any damage to it is found."""

import errno
import json
import os
import shutil

import pytest
import torch

from ft_dist.checkpoint.commit import format as layout
from ft_dist.checkpoint.commit.snapshot import HostBuffer
from ft_dist.checkpoint.find import newest_intact, newest_readable
from ft_dist.errors import CheckpointError, CheckpointVersionError, StorageError
from ft_dist.storage import retry

FILES = [layout.rank_name(0), layout.rank_name(1), layout.STATE, layout.MANIFEST]


def commit(root, step):
    folder = layout.step_folder(root, step)
    folder.mkdir(parents=True)
    buffer = HostBuffer(torch.device("cpu"))
    files = {}
    for rank in (0, 1):
        tensors = {f"{kind}/weight@{rank * 300}": torch.full((300,), float(step)) for kind in ("master", "exp_avg")}
        files[layout.rank_name(rank)] = buffer.snapshot(tensors).write(folder / layout.rank_name(rank))
    files[layout.STATE] = layout.write_synced(folder / layout.STATE, json.dumps({"step": step}))
    layout.write_manifest(folder, step, files)
    return folder


def test_a_folder_without_manifest_is_no_commit(tmp_path):
    commit(tmp_path, 1)
    (commit(tmp_path, 2) / layout.MANIFEST).unlink()
    assert [found.step for found in layout.commits(tmp_path)] == [1]


def test_the_fingerprint_from_memory_matches_the_disk(tmp_path):
    folder = commit(tmp_path, 3)
    for name, expected in layout.Commit(folder, 3).manifest()["files"].items():
        assert layout.fingerprint(folder / name) == expected


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "flipped bit": lambda path, other: flip(path),
    "cut short": lambda path, other: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path, other: path.write_bytes(b""),
    "deleted": lambda path, other: path.unlink(),
    "another step's": lambda path, other: shutil.copy(other / path.name, path),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_any_damage_is_found_and_the_previous_commit_used(tmp_path, file, damage):
    first = commit(tmp_path, 1)
    path = commit(tmp_path, 2) / file
    DAMAGES[damage](path, first)
    found, skipped = newest_intact(tmp_path)
    assert found.step == 1
    assert len(skipped) == 1
    assert str(path if damage != "deleted" or file != layout.MANIFEST else path.parent) in skipped[0]
    assert not path.exists()
    assert [left.step for left in layout.commits(tmp_path)] == [1]


def test_every_bit_of_a_small_commit_counts(tmp_path):
    folder = commit(tmp_path, 1)
    for file in (layout.STATE, layout.MANIFEST):
        whole = (folder / file).read_bytes()
        for at in range(len(whole)):
            (folder / file).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(CheckpointError):
                layout.verify(layout.Commit(folder, 1))
        (folder / file).write_bytes(whole)
    layout.verify(layout.Commit(folder, 1))


def test_commits_none_of_which_can_be_used_are_never_a_new_run(tmp_path):
    """They stay as they are, so that the next start says the same."""
    assert newest_intact(tmp_path) == (None, [])
    flip(commit(tmp_path, 1) / layout.STATE)
    (commit(tmp_path, 2) / layout.MANIFEST).unlink()
    for _ in range(2):
        for search in (newest_intact, newest_readable):
            with pytest.raises(CheckpointError, match=r"has checkpoints, but none that can be used: .*state\.json"):
                search(tmp_path)
    shutil.rmtree(layout.step_folder(tmp_path, 2))
    layout.step_folder(tmp_path, 1).rename(tmp_path / "step-00000001.damaged")
    with pytest.raises(CheckpointError, match="none that can be used"):
        newest_intact(tmp_path)


def test_another_format_version_is_refused_not_skipped(tmp_path, monkeypatch):
    commit(tmp_path, 1)
    with monkeypatch.context() as newer:
        newer.setattr(layout, "FORMAT_VERSION", 2)
        commit(tmp_path, 2)
    for search in (newest_intact, newest_readable):
        with pytest.raises(CheckpointVersionError, match="format version 2, but this version of ft_dist reads 1"):
            search(tmp_path)
    assert [found.step for found in layout.commits(tmp_path)] == [1, 2]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_read_error_is_retried_and_is_no_damage(tmp_path, monkeypatch, number):
    commit(tmp_path, 1)
    commit(tmp_path, 2)
    fails = iter([True, True, False])

    def flaky(path):
        if path.name == layout.rank_name(1) and path.parent.name == layout.step_name(2) and next(fails, True):
            raise OSError(number, os.strerror(number))
        return whole(path)

    whole = layout.fingerprint
    monkeypatch.setattr(layout, "fingerprint", flaky)
    monkeypatch.setattr(retry, "FIRST_DELAY_S", 0.01)
    found, skipped = newest_intact(tmp_path)
    assert (found.step, skipped) == (2, [])
    monkeypatch.setattr(retry, "LOCAL_WAIT_S", 0.1)
    with pytest.raises(StorageError, match="cannot be read"):
        newest_intact(tmp_path)
    assert [found.step for found in layout.commits(tmp_path)] == [1, 2]


def test_a_kill_while_a_step_is_published_again_leaves_one_of_the_two(tmp_path, monkeypatch):
    commit(tmp_path, 1)
    old = commit(tmp_path, 2)
    staging = commit(tmp_path / "other", 2)
    old.rename(old.with_name("step-00000002.replaced"))  # where a kill hits it
    found, skipped = newest_intact(tmp_path)
    assert (found.step, skipped) == (2, [])
    assert layout.verify(found) is None
    layout.publish(staging, layout.step_folder(tmp_path, 2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "step-00000001", "step-00000002"]


def test_a_kill_while_a_commit_is_deleted_leaves_nothing_that_looks_like_one(tmp_path, monkeypatch):
    commit(tmp_path, 1)
    commit(tmp_path, 2)
    with monkeypatch.context() as killed:
        killed.setattr(shutil, "rmtree", lambda *_, **__: None)
        layout.remove(tmp_path, 1)
    assert layout.remains(tmp_path) == [layout.step_folder(tmp_path, 2)]
    layout.finish_removals(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


@pytest.mark.parametrize("name", ["/etc/passwd", "../step-00000002/state.json", "a/b", ""])
def test_names_in_a_manifest_stay_in_its_folder(tmp_path, name):
    folder = commit(tmp_path, 1)
    files = layout.Commit(folder, 1).manifest()["files"]
    layout.write_manifest(folder, 1, {**files, name: {"bytes": 0, "xxh3": ""}})
    with pytest.raises(CheckpointError, match="names the file"):
        layout.verify(layout.Commit(folder, 1))


@pytest.mark.parametrize("name", ["step-²", "step-", "step-1x", "step--1", "step-" + "9" * 5000])
def test_other_folders_are_no_commits(name):
    assert layout.step_of(name) is None


def test_a_repeated_step_replaces_the_old_commit_completely(tmp_path):
    commit(tmp_path, 1)
    staging = commit(tmp_path / "other", 1)
    (staging / "extra").write_text("new")
    layout.publish(staging, layout.step_folder(tmp_path, 1))
    assert (layout.step_folder(tmp_path, 1) / "extra").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "step-00000001"]
