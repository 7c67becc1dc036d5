"""Damaged lines of a run folder's files are passed over, and counted when a resumed run drops them."""

import os

import pytest

from ft_dist.launcher.elastic.restarts import last_step as step_for_agent
from ft_dist.launcher.record import progress, state_of_folder
from ft_dist.observe.files import JsonLines, drop_after, last_record, last_step, records
from tests.conftest import read_lines

DAMAGED = [
    b'{"step": 4, "loss"\n',
    b"[1, 2]\n",
    b'"text"\n',
    b'{"step": "5"}\n',
    b'{"step": null}\n',
    b'{"step": 5.5}\n',
    b'{"step": -1}\n',
    b'{"name": "\xc3\n',
    b"[" * 20_000 + b"\n",
    b'{"step": ' + b"9" * 5000 + b"}\n",
    b"\0" * 100 + b"\n",
    b"\n",
]


def line(step):
    return b'{"step": %d, "loss": 1.0}\n' % step


@pytest.mark.parametrize("damaged", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_line_anywhere_is_dropped_and_counted(tmp_path, damaged):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(1) + damaged + line(2) + damaged + line(3))
    lines = JsonLines(path, keep_until=2)
    assert lines.notes == [f"{path}: 2 damaged lines dropped"]
    lines.write({"step": 3})
    assert [record["step"] for record in read_lines(path)] == [1, 2, 3]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


@pytest.mark.parametrize("damaged", DAMAGED, ids=range(len(DAMAGED)))
def test_readers_pass_over_a_damaged_tail(tmp_path, damaged):
    for name in ("metrics.jsonl", "events.jsonl"):
        (tmp_path / name).write_bytes(line(1) + line(2) + damaged + damaged[:-1])
    path = tmp_path / "metrics.jsonl"
    assert step_for_agent(tmp_path) == last_step(path) == 2
    assert [record["step"] for record in records(path) if record.get("step") in (1, 2)] == [1, 2]
    assert isinstance(last_record(path), dict)
    assert set(progress(tmp_path)) == {"step", "loss", "commit"}
    assert state_of_folder(tmp_path).state == "failed"


def test_the_usual_case_only_cuts_the_end_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(map(line, range(1, 8))) + line(8)[:10])
    inode = path.stat().st_ino
    assert drop_after(path, 5) == 0
    assert [record["step"] for record in read_lines(path)] == [1, 2, 3, 4, 5]
    assert path.stat().st_ino == inode


def test_a_last_line_without_its_end_is_kept_if_it_is_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(1) + line(2)[:-1])
    JsonLines(path, keep_until=2).write({"step": 3})
    assert [record["step"] for record in read_lines(path)] == [1, 2, 3]
