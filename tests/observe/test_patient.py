"""Lines that a disk refuses wait, and reach the file whole, once and in order."""

import os
import subprocess
import sys
import threading

import pytest

from ft_dist.observe import patient
from ft_dist.observe.files import JsonLines
from ft_dist.observe.patient import AppendedFile, Outage, ReplacedFile, append_to
from tests.conftest import ROOT, read_lines

# the limit of a file's size stands for a disk that fills up in the middle of a line
FILLED = """
import resource, sys
from pathlib import Path
from ft_dist.observe import patient
from ft_dist.observe.files import JsonLines
patient.RETRY_S = patient.SLOW_SHARE = 0.0
path = Path(sys.argv[1])
lines = JsonLines(path)
most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (100, most))
for step in range(1, 21):
    lines.write({"step": step})
    assert path.read_bytes().endswith(b"\\n"), "a part of a line is left"
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
lines.write({"step": 21})
print(*lines.outages(), sep="\\n")
assert lines.close() == ""
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(patient, "RETRY_S", 0.0)
    monkeypatch.setattr(patient, "SLOW_SHARE", 0.0)


@pytest.fixture
def blocked(tmp_path):
    """A file where a folder should be, so that nothing below it can be written."""
    place = tmp_path / "blocked"
    place.touch()
    return place


def test_a_disk_that_fills_up_in_a_line_leaves_no_part_of_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    command = [sys.executable, "-c", FILLED, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in read_lines(path)] == list(range(1, 22))
    began, over = done.stdout.splitlines()
    assert began == f"{path}: cannot be written (File too large). Training continues, and its lines wait"
    assert f"{path}: written again after " in over
    assert over.endswith("lines had waited")


def test_what_waits_is_bounded_and_what_was_dropped_is_counted(blocked, monkeypatch):
    monkeypatch.setattr(patient, "WAITING_BYTES", 50)
    file = AppendedFile(blocked / "log", lines=True)
    for number in range(10):
        file.write_bytes(b"%09d\n" % number)
    blocked.unlink()
    began, over = file.outages()
    assert (began.over, over) == (False, Outage(file.path, "File exists", True, 5, 5, over.seconds))
    assert str(over).endswith("5 lines had waited, 5 were dropped")
    assert file.path.read_text().split() == [f"{number:09d}" for number in range(5, 10)]
    assert (file.outages(), file.close()) == ([], "")


def test_what_never_reached_the_file_is_reported_at_the_end(blocked):
    file = AppendedFile(blocked / "log", lines=True)
    file.write_bytes(b"a\n")
    file.write_bytes(b"b\nc\n")
    assert file.close() == f"{file.path}: 3 lines could not be written (File exists)"


def test_a_fault_that_is_over_soon_after_the_end_loses_nothing(blocked):
    file = AppendedFile(blocked / "log", lines=True)
    file.write_bytes(b"a\n")
    threading.Timer(0.5, blocked.unlink).start()
    assert file.close() == ""
    assert file.path.read_text() == "a\n"


def test_a_line_that_another_process_left_incomplete_is_ended_first(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"event": "sta')
    append_to(path, b'{"event": "restarted"}\n')
    assert path.read_bytes() == b'{"event": "sta\n{"event": "restarted"}\n'
    lines = JsonLines(path)
    with path.open("ab") as file:
        file.write(b'{"ev')
    lines.write({"event": "end"})
    assert path.read_bytes().splitlines()[2:] == [b'{"ev', b'{"event": "end"}']


def test_of_a_file_that_is_replaced_only_the_newest_content_waits(blocked):
    file = ReplacedFile(blocked / "report.json")
    file.write_text("old")
    blocked.unlink()
    file.write_text("new")
    assert (file.path.read_text(), os.listdir(blocked)) == ("new", ["report.json"])
