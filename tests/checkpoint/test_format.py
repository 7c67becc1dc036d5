"""A folder is a commit exactly when its manifest is there, and every damage to it is found."""

import json

import pytest

from ft_dist.checkpoint import format as layout
from ft_dist.checkpoint.load import newest_intact
from ft_dist.errors import CheckpointError


def commit(root, step):
    folder = layout.step_folder(root, step)
    folder.mkdir(parents=True)
    (folder / "rank-00000.safetensors").write_bytes(bytes(range(256)) * 8 + bytes([step]))
    layout.write_synced(folder / "state.json", json.dumps({"step": step}))
    layout.write_manifest(folder, step)
    return folder


def test_a_folder_without_manifest_is_no_commit(tmp_path):
    commit(tmp_path, 1)
    (commit(tmp_path, 2) / layout.MANIFEST).unlink()
    assert [found.step for found in layout.commits(tmp_path)] == [1]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "flipped bit": flip,
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path: path.write_bytes(b""),
    "deleted": lambda path: path.unlink(),
}


@pytest.mark.parametrize("file", ["rank-00000.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_found_and_the_one_before_taken(tmp_path, file, damage):
    commit(tmp_path, 1)
    DAMAGES[damage](commit(tmp_path, 2) / file)
    found, passed_over = newest_intact(tmp_path)
    assert found.step == 1
    if (file, damage) != ("manifest.json", "deleted"):
        assert len(passed_over) == 1
        assert file in passed_over[0]


def test_a_file_of_another_step_is_found(tmp_path):
    other = commit(tmp_path, 1) / "rank-00000.safetensors"
    folder = commit(tmp_path, 2)
    (folder / "rank-00000.safetensors").write_bytes(other.read_bytes())
    with pytest.raises(CheckpointError, match="checksum"):
        layout.verify(layout.commits(tmp_path)[-1])


def test_nothing_intact_is_nothing(tmp_path):
    flip(commit(tmp_path, 1) / "state.json")
    found, passed_over = newest_intact(tmp_path)
    assert found is None
    assert len(passed_over) == 1
