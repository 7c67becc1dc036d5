"""A run whose disk is lost resumes from checkpoint.path; changed settings are shown, and forbidden ones refused."""

import shutil

import pytest

from ft_dist.checkpoint.commit.format import commits
from tests.conftest import SMALL_RUN, read_lines

pytestmark = pytest.mark.faults


def test_a_run_resumes_from_its_copies(cli, tmp_path):
    folder, second = tmp_path / "run", tmp_path / "second"
    arguments = [*SMALL_RUN, "checkpoint.interval_steps=4", f"checkpoint.path=file://{second}", "engine.zero_stage=2"]
    arguments.append("observe.wandb=offline")
    done = cli("train", *arguments, f"output_dir={folder}", "optim.max_steps=6", "--nproc", "2")
    assert done.returncode == 0, done.stderr
    assert [commit.step for commit in commits(second)] == [4, 6]
    run_id = (folder / "wandb_run_id").read_text()
    shutil.rmtree(folder)
    resumed = [*arguments, f"output_dir={folder}", "engine.zero_stage=3"]
    refused = cli("train", *resumed, "method.rank=4", "--nproc", "1")
    assert refused.returncode == 2
    assert "method.rank=4" in refused.stderr
    assert "Traceback" not in refused.stderr
    shutil.rmtree(folder)
    done = cli("train", *resumed, "--nproc", "1")
    assert done.returncode == 0, done.stderr
    assert "resumed from step 6" in done.stdout
    assert (folder / "wandb_run_id").read_text() == run_id
    assert list(folder.glob(f"wandb/offline-run-*-{run_id}")), "it continues the same run at wandb"
    assert "changed since the checkpoint: engine.zero_stage: 2 -> 3" in done.stdout
    events = read_lines(folder / "events.jsonl")
    assert {"config_changed", "saved", "mirrored"} <= {event["event"] for event in events}
    listed = cli("checkpoint", "ls", str(folder))
    assert "step-00000010" in listed.stdout
    assert cli("checkpoint", "verify", str(folder)).returncode == 0
    state = commits(folder / "checkpoints")[-1].folder / "state.json"
    state.write_text(state.read_text().replace("tokens", "Tokens"))
    damaged = cli("checkpoint", "verify", str(folder))
    assert damaged.returncode == 2
    assert str(state) in damaged.stdout
