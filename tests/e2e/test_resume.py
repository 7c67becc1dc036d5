"""Killed at any point and started again, a run repeats the same steps bit for bit."""

import signal
import subprocess
import time
from pathlib import Path

import pytest

from ft_dist.checkpoint.commit.format import commits
from tests.chaos.storm import workers_of
from tests.conftest import ROOT, SMALL_RUN, read_lines, start_cli

STEPS = 24
ARGUMENTS = [
    *(argument for argument in SMALL_RUN if "packing" not in argument),
    f"optim.max_steps={STEPS}",
    "checkpoint.interval_steps=5",
    "method.dropout=0.1",
]
FEW = [("full", 0), ("lora", 1), ("lora", 2), ("full", 3)]
ALL = [(kind, stage) for kind in ("full", "lora") for stage in range(4)]


def arguments(folder: Path, kind: str, stage: int | str, nproc: int = 2, dtype: str = "fp32") -> list[str]:
    method = [f"method.kind={kind}", f"engine.zero_stage={stage}", f"output_dir={folder}", f"model.dtype={dtype}"]
    return ["train", *ARGUMENTS, *method, "--nproc", str(nproc), "--max-restarts", "0"]


def wait_for_step(process: subprocess.Popen[str], folder: Path, step: int, timeout_s: float = 240) -> None:
    deadline = time.monotonic() + timeout_s
    metrics = folder / "metrics.jsonl"
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        if metrics.exists() and metrics.read_text().count("\n") >= step:
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} not reached in {timeout_s} s")


def history(folder: Path) -> list[tuple]:
    keys = ("step", "loss", "grad_norm", "lr", "labelled_tokens", "samples_seen", "epoch")
    metrics = [tuple(line[key] for key in keys) for line in read_lines(folder / "metrics.jsonl")]
    samples = [(line["step"], line["rows"]) for line in read_lines(folder / "samples.jsonl")]
    assert [line[0] for line in metrics] == [line[0] for line in samples] == list(range(1, STEPS + 1))
    return [*metrics, *samples]


def check_killed_run_repeats(cli, tmp_path, kind, stage):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert cli(*arguments(whole, kind, stage)).returncode == 0
    process = start_cli(*arguments(killed, kind, stage))
    wait_for_step(process, killed, 12)
    subprocess.run(["kill", "-9", str(workers_of(process.pid)[1])], check=True)
    process.communicate(timeout=60)
    assert process.returncode == 1
    resumed = cli(*arguments(killed, kind, stage))
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed from step" in resumed.stdout
    assert history(killed) == history(whole)


@pytest.mark.parametrize("kind, stage", FEW)
def test_a_killed_rank_changes_no_bit(cli, tmp_path, kind, stage):
    check_killed_run_repeats(cli, tmp_path, kind, stage)


def test_bf16_resumes_bit_for_bit_and_at_another_stage(cli, tmp_path):
    """Whole gradients in flat tensors (stage 1, "auto") after a kill; then the same commit in shares (stage 2)."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert cli(*arguments(whole, "lora", "auto", dtype="bf16")).returncode == 0
    process = start_cli(*arguments(killed, "lora", "auto", dtype="bf16"))
    wait_for_step(process, killed, 12)
    subprocess.run(["kill", "-9", str(workers_of(process.pid)[1])], check=True)
    process.communicate(timeout=60)
    step_10 = f"checkpoint.resume={killed / 'checkpoints/step-00000010'}"
    for stage, nproc, tolerance in (("2", 1, 2e-2), ("auto", 2, 0.0)):
        resumed = cli(*arguments(tmp_path / stage, "lora", stage, nproc=nproc, dtype="bf16"), step_10)
        assert resumed.returncode == 0, resumed.stderr
        assert f"ZeRO {1 if stage == 'auto' else 2}, bf16" in resumed.stdout
        losses = [line["loss"] for line in read_lines(tmp_path / stage / "metrics.jsonl")]
        uninterrupted = [line["loss"] for line in read_lines(whole / "metrics.jsonl")][10:]
        assert losses == (pytest.approx(uninterrupted, rel=tolerance) if tolerance else uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("kind, stage", [case for case in ALL if case not in FEW])
def test_every_stage_survives_a_killed_rank(cli, tmp_path, kind, stage):
    check_killed_run_repeats(cli, tmp_path, kind, stage)


def samples(folder: Path) -> list[tuple]:
    return [(line["step"], line["rows"]) for line in read_lines(folder / "samples.jsonl")]


@pytest.mark.faults
def test_the_samples_of_every_step_are_the_same_on_any_number_of_ranks(cli, tmp_path):
    """1, 2 and 3 ranks, and 2 killed, then 3 killed, then 1."""
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    assert cli(*arguments(alone, "lora", 2, nproc=1)).returncode == 0
    assert len(samples(alone)) == STEPS
    for nproc in (2, 3):
        folder = tmp_path / f"ranks-{nproc}"
        assert cli(*arguments(folder, "lora", 2, nproc=nproc)).returncode == 0
        assert samples(folder) == samples(alone)
    for nproc, until in ((2, 7), (3, 13)):
        process = start_cli(*arguments(killed, "lora", 2, nproc=nproc))
        wait_for_step(process, killed, until)
        subprocess.run(["kill", "-9", str(workers_of(process.pid)[-1])], check=True)
        process.communicate(timeout=60)
        assert process.returncode == 1
    assert cli(*arguments(killed, "lora", 2, nproc=1)).returncode == 0
    assert samples(killed) == samples(alone)


def test_a_source_added_between_two_starts_is_reported(cli, tmp_path):
    folder, extra = tmp_path / "run", tmp_path / "extra.jsonl"
    emails = ROOT / "configs/emails"
    extra.write_text("".join((emails / "test.jsonl").read_text().splitlines(keepends=True)[:30]))
    small = [*arguments(folder, "lora", 0, nproc=1), f"data.train=[{emails / 'train.jsonl'}]"]
    assert cli(*small, "optim.max_steps=3").returncode == 0
    more = [*small[:-1], f"data.train=[{emails / 'train.jsonl'}, {extra}]", "optim.max_steps=6"]
    resumed = cli(*more)
    assert resumed.returncode == 0, resumed.stderr
    assert f"note: data.train has changed: {extra} added: 30 samples per epoch" in resumed.stdout
    (event,) = (line for line in read_lines(folder / "events.jsonl") if line["event"] == "data_changed")
    assert event["step"] == 3
    assert [source["first_id"] for source in event["sources"]] == [0, 480]
    seen = [sample for line in read_lines(folder / "samples.jsonl") for row in line["rows"] for sample in row]
    assert max(seen[-60:]) >= 480
    extra.write_text("".join(extra.read_text().splitlines(keepends=True)[1:]))
    refused = cli(*more, "optim.max_steps=9")
    assert refused.returncode == 2
    assert f"{extra}: its samples differ from those that the checkpoint" in refused.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_commits_and_exits_75(cli, tmp_path, number):
    folder = tmp_path / "run"
    process = start_cli(*arguments(folder, "lora", 2))
    wait_for_step(process, folder, 7)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75, out
    done = len(read_lines(folder / "metrics.jsonl"))
    assert commits(folder / "checkpoints")[-1].step == done < STEPS
    assert read_lines(folder / "events.jsonl")[-1]["event"] == "preempted"
    # on another number of ranks and another stage it resumes from that step
    resumed = cli(*arguments(folder, "lora", 3, nproc=1))
    assert resumed.returncode == 0, resumed.stderr
    assert f"resumed from step {done}" in resumed.stdout
    assert [line["step"] for line in read_lines(folder / "metrics.jsonl")] == list(range(1, STEPS + 1))


def test_no_worker_outlives_a_killed_launcher(tmp_path):
    folder = tmp_path / "run"
    process = start_cli(*arguments(folder, "lora", 2))
    wait_for_step(process, folder, 2)
    workers = workers_of(process.pid)
    assert len(workers) == 2
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "workers are still there 10 s after their launcher was killed"
        time.sleep(0.05)


def test_a_damaged_commit_is_reported_and_the_previous_one_used(cli, tmp_path):
    folder = tmp_path / "run"
    assert cli(*arguments(folder, "lora", 2, nproc=1), "optim.max_steps=10").returncode == 0
    newest = commits(folder / "checkpoints")[-1].folder / "rank-00000.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    resumed = cli(*arguments(folder, "lora", 2, nproc=1))
    assert resumed.returncode == 0, resumed.stderr
    assert f"{newest}: its checksum is not the committed one" in resumed.stdout
    assert "resumed from step 5" in resumed.stdout
