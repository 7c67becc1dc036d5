"""A commit that fails at the end of a run is repeated for a while, and what is lost is said."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ft_dist.checkpoint.commit.format import commits
from tests.conftest import SMALL_RUN, read_lines, start_cli
from tests.faults.shim import Rule, Shim
from tests.launcher.processes import events_of, wait_for

pytestmark = pytest.mark.faults


@pytest.fixture
def mount_tmpfs(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount one with these options (`size=..,nr_inodes=..`) at a new folder."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], check=False).returncode:
            pytest.skip("mounting needs root")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=False)


def test_a_disk_that_gets_room_before_the_run_gives_up_loses_nothing(tmp_path):
    folder = tmp_path / "run"
    failing = Shim(tmp_path, [Rule("write", "rank-0000", "ENOSPC")])
    options = [*SMALL_RUN, f"output_dir={folder}", "checkpoint.interval_steps=4", "--nproc", "2"]
    with start_cli("train", *options, **failing.environment) as process:
        wait_for(lambda: any(event["step"] == 10 for event in events_of(folder, "save_failed")), [process])
        failing.disarm()
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    assert "note: the last steps are not saved: trying again for up to " in out
    assert [commit.step for commit in commits(folder / "checkpoints")] == [10]
    assert events_of(folder, "end")


def test_without_inodes_the_newest_commit_stays_and_the_same_command_goes_on_there(cli, mount_tmpfs):
    disk = mount_tmpfs("size=50m,nr_inodes=60")
    folder = disk / "run"
    options = [*SMALL_RUN, f"output_dir={folder}", "checkpoint.interval_steps=4", "--nproc", "1"]
    with start_cli("train", *options) as process:
        wait_for(lambda: bool(commits(folder / "checkpoints")), [process])
        fillers = []
        while True:
            filler = disk / f"filler{len(fillers)}"
            try:
                filler.touch()
            except OSError:
                break
            fillers.append(filler)
        out, err = process.communicate(timeout=120)
    newest = commits(folder / "checkpoints")[-1].step
    assert process.returncode == 2, out + err
    assert "note: step 10 was not saved: " in out
    last = err.strip().splitlines()[-1]
    assert f"final: cannot be written (No space left on device). The commit of step {newest} is safe" in last
    assert "The steps after it, up to 10, could not be saved and are trained again." in last
    assert not events_of(folder, "restarted")
    for filler in fillers:
        os.unlink(filler)
    again = cli("train", *options)
    assert again.returncode == 0, again.stderr
    assert f"resumed from step {newest}" in again.stdout
    assert [line["step"] for line in read_lines(folder / "metrics.jsonl")] == list(range(1, 11))
