"""Real runs whose disk, console or trackers fail: they train to the end as if nothing had happened."""

import json
import os
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from tests.conftest import CLI, ROOT, SMALL_RUN, read_lines, start_cli
from tests.faults.shim import Rule, Shim
from tests.launcher.processes import events_of, wait_for

pytestmark = pytest.mark.faults


def losses(folder):
    return [(line["step"], line["loss"]) for line in read_lines(folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The losses of SMALL_RUN."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    done = subprocess.run([*CLI, "train", *SMALL_RUN, f"output_dir={folder}", "--nproc", "1"], cwd=ROOT, check=False)
    assert done.returncode == 0
    return losses(folder)


def test_lines_wait_for_a_full_disk_and_a_torn_file_is_repaired_at_the_resume(cli, tmp_path, undisturbed):
    folder = tmp_path / "run"
    failing = Shim(tmp_path, [Rule("write", ".jsonl", "ENOSPC")])
    options = [*SMALL_RUN, f"output_dir={folder}", "checkpoint.interval_steps=5", "--nproc", "1"]
    with start_cli("train", *options, **failing.environment) as process:
        wait_for(lambda: (folder / "checkpoints/step-00000005/manifest.json").exists(), [process])
        assert (folder / "metrics.jsonl").read_bytes() == b""
        failing.disarm()
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert losses(folder) == undisturbed
    assert len(read_lines(folder / "samples.jsonl")) == 10
    assert out.count("cannot be written (No space left on device). Training continues, and its lines wait") == 3
    assert {"start", "saved", "end"} <= {line["event"] for line in read_lines(folder / "events.jsonl")}
    # damage that a full disk or a power cut leaves
    for name, damage in {
        "metrics": b'{"step": 3, "na\xc3\n[1]\n{"st',
        "events": b'{"when": "before"\n7\n{"eve',
    }.items():
        with (folder / f"{name}.jsonl").open("ab") as file:
            file.write(damage)
    again = cli("train", *options, "optim.max_steps=12", "data.eval=[emails/test.jsonl]", "evaluate.max_samples=4")
    assert again.returncode == 0, again.stderr
    assert f"note: {folder / 'metrics.jsonl'}: 2 damaged lines dropped" in again.stdout
    assert [step for step, _ in losses(folder)] == list(range(1, 13))


def test_a_disk_that_stays_full_for_all_but_the_result_loses_only_the_record(cli, tmp_path):
    folder = tmp_path / "run"
    for text in (".jsonl", "rank-0.log"):
        failing = Shim(tmp_path, [Rule("write", text, "EIO")])
        done = cli(
            "train", *SMALL_RUN, "optim.max_steps=2", f"output_dir={folder}", "--nproc", "1", **failing.environment
        )
        assert done.returncode == 0, (text, done.stdout, done.stderr)
        assert "could not be written (Input/output error)" in done.stdout, (text, done.stdout)
        assert json.loads((folder / "summary.json").read_text())["final_check"]["agrees"]


def test_old_lines_that_cannot_be_rewritten_do_not_stop_a_resume(cli, tmp_path):
    folder = tmp_path / "run"
    options = [*SMALL_RUN, f"output_dir={folder}", "checkpoint.interval_steps=1", "--nproc", "1"]
    assert cli("train", *options, "optim.max_steps=2").returncode == 0
    path = folder / "metrics.jsonl"
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + b"torn\n" + second)
    failing = Shim(tmp_path, [Rule("rename", "metrics.jsonl", "ENOSPC")])
    done = cli("train", *options, "optim.max_steps=4", **failing.environment)
    assert done.returncode == 0, done.stderr
    assert f"{path}: 2 lines could not be written (No space left on device)" in done.stdout
    assert path.read_bytes() == first + b"torn\n" + second


@pytest.mark.parametrize("streams", ["| head -1", ">&- 2>&- <&-"])
def test_a_run_outlives_its_console(tmp_path, undisturbed, streams):
    folder = tmp_path / "run"
    words = " ".join(f"'{word}'" for word in [*CLI, "train", *SMALL_RUN, f"output_dir={folder}", "--nproc", "2"])
    shell = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {words} {streams}"], cwd=ROOT, check=False, text=True, stdout=subprocess.PIPE
    )
    assert shell.returncode == 0
    assert [step for step, _ in losses(folder)] == [step for step, _ in undisturbed]
    for rank in range(2):
        log = (folder / "logs" / f"rank-{rank}.log").read_text()
        assert "Error" not in log
        assert ("finished: " in log) == (rank == 0)


def test_tensorboard_without_a_place_to_write_is_noted_once(cli, tmp_path, undisturbed):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "tensorboard").touch()
    done = cli("train", *SMALL_RUN, f"output_dir={folder}", "observe.tensorboard=true", "--nproc", "1")
    assert done.returncode == 0, done.stderr
    assert losses(folder) == undisturbed
    assert done.stdout.count("note: tensorboard fails (") == 1
    assert "note: tensorboard: 10 records not sent." in done.stdout


class Answering(BaseHTTPRequestHandler):
    """A server that answers, but is not wandb."""

    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("missing", ["server", "key"])
def test_wandb_without_a_server_or_a_key_is_kept_for_a_later_upload(cli, tmp_path, undisturbed, missing):
    folder = tmp_path / "run"
    with HTTPServer(("127.0.0.1", 0), Answering) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port, key = (9, "0" * 40) if missing == "server" else (server.server_port, "")
        environment = {"WANDB_BASE_URL": f"http://127.0.0.1:{port}", "WANDB_API_KEY": key, "NETRC": os.devnull}
        done = cli("train", *SMALL_RUN, f"output_dir={folder}", "observe.wandb=online", "--nproc", "1", **environment)
        server.shutdown()
    assert done.returncode == 0, done.stderr
    assert losses(folder) == undisturbed
    run_id = (folder / "wandb_run_id").read_text()
    assert "note: wandb cannot be used (" in done.stdout
    assert (f"127.0.0.1:{port} does not answer" in done.stdout) == (missing == "server")
    assert f"wandb sync {folder / 'wandb'}/offline-run-*-{run_id}" in done.stdout
    (kept,) = (folder / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb")
    assert kept.stat().st_size > 1000


def test_the_end_of_a_run_is_durable_before_it_is_announced(cli, tmp_path):
    """A sync that fails is noticed; `summary.json`, which says that the run has finished, is written last."""
    folder = tmp_path / "run"
    options = [*SMALL_RUN, "optim.max_steps=1", f"output_dir={folder}", "--nproc", "1"]
    for place in ("summary.json", ".final-partial"):
        failing = Shim(tmp_path, [Rule("fsync", place, "EIO")])
        done = cli("train", *options, **failing.environment)
        assert done.returncode == 2, (place, done.stderr)
        assert "cannot be written (Input/output error)" in done.stderr
        assert not (folder / "summary.json").exists()
        assert "run the same command again" in done.stderr
    started = time.time()
    assert cli("train", *options).returncode == 0
    assert (folder / "summary.json").stat().st_mtime >= (folder / "final").stat().st_mtime - 1
    assert (folder / "final").stat().st_mtime >= started - 1
    assert len(events_of(folder, "end")) == 1
