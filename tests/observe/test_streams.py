"""A console that closes, fails, stands still or never existed ends nothing; the log file gets everything."""

import os
import subprocess
import sys
import time

from tests.conftest import ROOT
from tests.faults.shim import Rule, Shim

PRINTS = """
import logging, sys
from pathlib import Path
from tqdm import tqdm
from ft_dist.observe import streams
from ft_dist.observe.patient import AppendedFile
streams.WAIT_S = 0.5
streams.secure_streams()
streams.secure_streams()
streams.copy_streams(AppendedFile(Path(sys.argv[1]), lines=False), only=False)
logging.basicConfig()
for number in range(int(sys.argv[2])):
    print("line", number, "é", flush=True)
logging.warning("warned")
for _ in tqdm(range(3), mininterval=0): pass
open(sys.argv[1] + ".opened", "w").write("own")
print("the end", end="")
sys.exit(3)
"""


def start(log, lines=20, *, before="", **options):
    command = [sys.executable, "-c", before + PRINTS, str(log), str(lines)]
    return subprocess.Popen(command, cwd=ROOT, **options)


def logged(log, lines=20):
    text = log.read_text()
    assert text.startswith("".join(f"line {number} é\n" for number in range(lines)))
    assert text.endswith("the end")
    assert "warned" in text
    assert "3/3" in text
    assert "Error" not in text
    assert (log.parent / f"{log.name}.opened").read_text() == "own"
    return True


def test_a_reader_that_leaves_ends_nothing(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    process = start(tmp_path / "log", stdout=writer, stderr=writer)
    os.close(writer)
    assert process.wait(60) == 3
    assert logged(tmp_path / "log")


def test_closed_descriptors_are_not_given_to_other_files(tmp_path):
    # as a shell starts a process with `>&- 2>&- <&-`
    close = "import os\nfor number in range(3): os.close(number)\n"
    process = start(tmp_path / "log", before=close)
    assert process.wait(60) == 3
    assert logged(tmp_path / "log")
    # and one that only then becomes Python
    arguments = [sys.executable, "-c", PRINTS, str(tmp_path / "second"), "20"]
    assert (
        subprocess.run(
            [sys.executable, "-c", f"{close}os.execv({arguments[0]!r}, {arguments!r})"], cwd=ROOT, check=False
        ).returncode
        == 3
    )
    assert logged(tmp_path / "second")


def test_a_console_that_takes_nothing_holds_up_once_and_says_what_it_missed(tmp_path):
    reader, writer = os.pipe()
    started = time.monotonic()
    process = start(tmp_path / "log", 20_000, stdout=writer, stderr=subprocess.DEVNULL)
    os.close(writer)
    assert process.wait(60) == 3
    assert time.monotonic() - started < 30
    assert logged(tmp_path / "log", 20_000)
    shown = os.read(reader, 1 << 20).decode().splitlines()
    assert shown[:2] == ["line 0 é", "line 1 é"]


def test_a_console_on_a_failing_disk_ends_nothing(tmp_path):
    failing = Shim(tmp_path, [Rule("write", "terminal", "EIO")])
    with (tmp_path / "terminal").open("w") as console:
        process = start(tmp_path / "log", stdout=console, stderr=console, env=os.environ | failing.environment)
    assert process.wait(60) == 3
    assert logged(tmp_path / "log")


def test_a_console_without_the_letters_gets_others(tmp_path):
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    process = start(tmp_path / "log", stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 3
    assert out.splitlines()[0] == b"line 0 ?"
