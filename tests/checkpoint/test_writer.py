"""Saving in the background: later training does not change the copy, and a failure loses only one checkpoint."""

import json
import os
import subprocess
import sys
import threading

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from ft_dist.checkpoint.commit import format as layout
from ft_dist.checkpoint.commit import writer as writer_module
from ft_dist.checkpoint.commit.retention import Retention
from ft_dist.checkpoint.commit.writer import CheckpointWriter
from ft_dist.checkpoint.find import newest_intact
from ft_dist.checkpoint.load import SavedFragments
from ft_dist.distributed import World
from ft_dist.errors import CheckpointError
from tests.conftest import ROOT

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def store():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def rank(root, number=0, size=1, keep=2, timeout_s=30.0):
    world = World(rank=number, size=size, local_rank=number, local_size=size, device=CPU)
    return CheckpointWriter(root, world, retention=Retention(keep), timeout_s=timeout_s)


def save(writer, step, tensors=None, **kwargs):
    writer.save(tensors or {"master/w@0": torch.full((1000,), float(step))}, step=step, state={"step": step}, **kwargs)


def events(writer):
    return [(event.name, event.step) for event in writer.new_events()]


class SlowToCopy:
    """Values whose copy waits for `release`."""

    dtype = torch.float32

    def __init__(self, values):
        self.values, self.shape, self.nbytes = values, values.shape, values.nbytes
        self.release = threading.Event()

    def element_size(self):
        return 4

    def detach(self):
        self.release.wait(30)
        return self.values


def test_an_update_waits_for_the_copy_and_not_for_the_disk(tmp_path):
    writer = rank(tmp_path)
    assert writer.wait_until_copied() < 0.1
    slow = SlowToCopy(torch.ones(10))
    save(writer, 1, {"master/w@0": slow})
    assert not writer._copied.is_set()
    threading.Timer(0.3, slow.release.set).start()
    assert writer.wait_until_copied() > 0.2
    slow.values.zero_()
    writer.close()
    assert torch.equal(load_file(layout.commits(tmp_path)[0].fragment_files()[0])["master/w@0"], torch.ones(10))


def test_a_failed_snapshot_does_not_block_the_update(tmp_path):
    writer = rank(tmp_path)
    unknown = torch.zeros(3, dtype=torch.complex64)
    save(writer, 1, {"master/w@0": unknown})
    writer.wait_until_copied()
    writer.close()
    assert events(writer) == [("save_failed", 1)]


def test_a_save_is_the_state_at_its_call(tmp_path):
    writer = rank(tmp_path)
    weights = torch.randn(1_000_000)
    moments = torch.randn(7, dtype=torch.float64)
    before = weights.clone()
    save(writer, 1, {"master/w@0": weights, "exp_avg/w@0": moments, "codes/w@0": torch.arange(5, dtype=torch.uint8)})
    writer.wait_until_copied()
    weights.zero_()
    writer.wait()
    assert events(writer) == [("saved", 1)]
    commit = layout.commits(tmp_path)[0]
    layout.verify(commit)
    saved = load_file(commit.fragment_files()[0])
    assert torch.equal(saved["master/w@0"], before)
    assert torch.equal(saved["exp_avg/w@0"], moments)
    assert torch.equal(saved["codes/w@0"], torch.arange(5, dtype=torch.uint8))
    # the host memory is reused
    save(writer, 2, {"master/w@0": weights})
    writer.close()
    assert torch.equal(load_file(layout.commits(tmp_path)[-1].fragment_files()[0])["master/w@0"], weights)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_a_late_rank_delays_the_commit_and_the_next_save(tmp_path):
    first, second = rank(tmp_path, 0, 2), rank(tmp_path, 1, 2)
    save(first, 1)
    late = threading.Timer(0.3, lambda: save(second, 1, {"master/w@1000": torch.ones(10)}))
    late.start()
    save(first, 2)
    late.join()
    save(second, 2, {"master/w@1000": torch.ones(10)})
    first.wait()
    second.wait()
    assert events(first) == [("saved", 1), ("save_waited", 2), ("saved", 2)]
    assert [len(commit.fragment_files()) for commit in layout.commits(tmp_path)] == [2, 2]


def test_one_rank_that_cannot_write_loses_that_checkpoint_only(tmp_path):
    first, second = rank(tmp_path, 0, 2), rank(tmp_path, 1, 2)
    for step in (1, 2, 3):
        if step == 2:
            staging = next(iter(tmp_path.glob(".attempt-*"))).name.removeprefix(".attempt-")
            (tmp_path / f"step-00000002.saving-{staging}" / layout.rank_name(1)).mkdir(parents=True)
        for writer in (first, second):
            save(writer, step)
        first.wait()
        second.wait()
    seen = first.new_events()
    assert [(event.name, event.step) for event in seen] == [("saved", 1), ("save_failed", 2), ("saved", 3)]
    assert "rank-00001.safetensors: cannot be written" in seen[1].note
    assert "step-00000001" in seen[1].note
    assert [commit.step for commit in layout.commits(tmp_path)] == [1, 3]
    assert not list(tmp_path.glob("*.saving-*"))


def test_a_rank_that_never_writes_is_named(tmp_path):
    first, _ = rank(tmp_path, 0, 2, timeout_s=0.3), rank(tmp_path, 1, 2)
    save(first, 1)
    first.wait()
    (event,) = first.new_events()
    assert event.name == "save_failed"
    assert "rank 1 did not write" in event.note


def test_disks_that_are_not_shared_are_refused_at_start(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "_VISIBLE_S", 0.2)
    rank(tmp_path / "node0", 0, 2)
    (tmp_path / "node1").mkdir()
    with pytest.raises(CheckpointError, match="rank 1 does not see what rank 0 writes"):
        rank(tmp_path / "node1", 1, 2)


def test_the_remains_of_a_killed_save_are_removed_and_never_used(tmp_path):
    save(writer := rank(tmp_path), 1)
    writer.wait()
    left = tmp_path / "step-00000002.saving-dead"
    left.mkdir()
    (left / layout.rank_name(0)).write_bytes(b"half")
    assert newest_intact(tmp_path)[0].step == 1
    rank(tmp_path)
    assert not left.exists()


FULL_DISK = """
import shutil, sys, torch, torch.distributed as dist
from pathlib import Path
from tests.checkpoint.test_writer import rank, save
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
writer, look = rank(Path(sys.argv[1]), keep=1), shutil.disk_usage
for step, numel in enumerate((100_000, 100_000, 700_000, 100_000), 1):
    # 1: disable the check before a write, as if other programs filled the disk after it
    shutil.disk_usage = look if step != 3 or sys.argv[2] == "0" else lambda path: look("/")
    save(writer, step, {"master/w@0": torch.ones(numel)})
    writer.wait()
    for event in writer.new_events():
        print(event.name, event.step, event.note or "")
"""


@pytest.mark.parametrize("blind", [0, 1])
def test_a_full_disk_loses_the_checkpoint_not_the_run(tmp_path, blind):
    """On a file system of 2 MB; the lack of space is found before or during a write."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("cannot mount a small tmpfs here")
    try:
        done = subprocess.run(
            [sys.executable, "-c", FULL_DISK, str(small), str(blind)],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/kernels"},
        )
        lines = done.stdout.splitlines()
        assert [line.split()[:2] for line in lines if "nearly" not in line] == [
            ["saved", "1"], ["saved", "2"], ["save_failed", "3"], ["saved", "4"]
        ], done.stderr  # fmt: skip
        reason = next(line for line in lines if line.startswith("save_failed"))
        assert ("No space left on device" if blind else "free on its disk") in reason
        assert "step-00000002" in reason
        commit, skipped = newest_intact(small)
        assert (commit.step, skipped) == (4, [])
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_retention_keeps_newest_milestones_and_best():
    steps = list(range(10, 110, 10))
    losses = {10: 3.0, 20: 1.0, 40: 2.0, 80: 0.5}
    retention = Retention(keep=2, every_steps=50, best=2)
    assert retention.surplus(steps, newest=100, losses=losses) == [10, 30, 40, 60, 70]
    assert Retention(1).surplus([10], newest=10, losses={}) == []
    # a run that went back to step 20 never deletes its latest save, even if later steps exist
    assert 20 not in Retention(1).surplus([10, 20, 90, 100], newest=20, losses={})


def test_the_writer_deletes_by_the_rule(tmp_path):
    writer = CheckpointWriter(
        tmp_path, World(0, 1, 0, 1, CPU), retention=Retention(1, every_steps=3, best=1), timeout_s=30
    )
    losses = {}
    for step in range(1, 9):
        save(writer, step, held_out_losses=losses)
        losses[step] = abs(step - 4)
    writer.close()
    assert [commit.step for commit in layout.commits(tmp_path)] == [3, 4, 6, 8]


@pytest.mark.parametrize("numel, before, after", [(1000, 2, 3), (1003, 3, 1), (5, 4, 3), (1, 3, 2)])
def test_any_partition_loads_into_any_other(tmp_path, numel, before, after):
    """Odd sizes, ranks without elements, and more ranks than elements."""
    whole = torch.randn(numel)
    ranks = [rank(tmp_path, number, before) for number in range(before)]
    for number, writer in enumerate(ranks):
        low, high = cut(numel, before, number)
        save(writer, 1, {f"master/a.b@{low}": whole[low:high], f"exp_avg/a.b@{low}": -whole[low:high]})
    for writer in reversed(ranks):
        writer.wait()
    fragments = SavedFragments(layout.commits(tmp_path)[0].fragment_files())
    for number in range(after):
        low, high = cut(numel, after, number)
        for kind, truth in (("master", whole), ("exp_avg", -whole)):
            tensor = torch.full((high - low,), torch.nan)
            assert fragments.copy_into(tensor, kind, "a.b", start=low) == high - low
            assert torch.equal(tensor, truth[low:high])


def cut(numel, size, number):
    width = -(-numel // size)
    return min(numel, number * width), min(numel, (number + 1) * width)


def test_states_quantised_in_blocks_are_saved_unchanged(tmp_path):
    """8-bit codes with one fp32 scale for 256 elements (Dettmers et al., arXiv 2110.02861), cut between blocks."""
    block, blocks = 256, 6
    state = torch.randn(blocks, block)
    scale = state.abs().amax(dim=1)
    codes = (state / scale[:, None] * 127).round().to(torch.int8).view(-1)
    ranks = [rank(tmp_path, number, 2) for number in range(2)]
    for number, writer in enumerate(ranks):
        low, high = cut(blocks, 2, number)
        save(writer, 1, {
            f"exp_avg.codes/w@{low * block}": codes[low * block : high * block],
            f"exp_avg.scale/w@{low}": scale[low:high],
        })  # fmt: skip
    for writer in reversed(ranks):
        writer.wait()
    fragments = SavedFragments(layout.commits(tmp_path)[0].fragment_files())
    for number in range(4):
        low, high = cut(blocks, 4, number)
        some_codes, some_scale = torch.empty((high - low) * block, dtype=torch.int8), torch.empty(high - low)
        assert fragments.copy_into(some_codes, "exp_avg.codes", "w", start=low * block) == some_codes.numel()
        assert fragments.copy_into(some_scale, "exp_avg.scale", "w", start=low) == some_scale.numel()
        assert torch.equal(some_codes, codes[low * block : high * block])
        assert torch.equal(some_scale, scale[low:high])


def test_the_manifest_matches_the_files(tmp_path):
    save(writer := rank(tmp_path), 5)
    writer.wait()
    commit = layout.commits(tmp_path)[0]
    assert json.loads((commit.folder / layout.STATE).read_text()) == {"step": 5}
    assert commit.size_bytes() == sum(
        path.stat().st_size for path in commit.folder.iterdir() if path.name != layout.MANIFEST
    )
