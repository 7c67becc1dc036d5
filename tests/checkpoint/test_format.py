"""A folder is a commit if and only if it has a manifest, and any damage to it is found."""

import json
import shutil

import pytest
import torch

from ft_dist.checkpoint.commit import format as layout
from ft_dist.checkpoint.commit.snapshot import HostBuffer
from ft_dist.checkpoint.find import newest_intact
from ft_dist.errors import CheckpointError

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
    if (file, damage) != (layout.MANIFEST, "deleted"):
        # a folder without manifest was never a commit; every other damage is named
        assert len(skipped) == 1
        assert str(path) in skipped[0]
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


def test_without_an_intact_commit_there_is_none(tmp_path):
    flip(commit(tmp_path, 1) / layout.STATE)
    found, skipped = newest_intact(tmp_path)
    assert found is None
    assert len(skipped) == 1


def test_a_repeated_step_replaces_the_old_commit_completely(tmp_path):
    commit(tmp_path, 1)
    staging = commit(tmp_path / "other", 1)
    (staging / "extra").write_text("new")
    layout.publish(staging, layout.step_folder(tmp_path, 1))
    assert (layout.step_folder(tmp_path, 1) / "extra").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "step-00000001"]
