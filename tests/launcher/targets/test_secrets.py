"""Credentials are never written: they stay in the environment of the submitting shell, or with the platform."""

import itertools
import json
import sys
from pathlib import Path

import pytest
import yaml

from ft_dist.errors import ConfigError
from ft_dist.launcher.profiles import load_profile
from tests.conftest import SMALL_RUN
from tests.launcher.slurm_cluster import slurm_cluster

PLANTED = {
    name: f"planted-{name.lower()}"
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AZURE_STORAGE_KEY")
}
TARGETS = {
    "local": [],
    "torchrun": ["--nodes", "2", "--rdzv", "10.0.0.1:29500"],
    "slurm": ["--gpus-per-node", "0"],
    "sky": ["--profile", "sky-spot"],
    "k8s": ["--profile", "kubernetes"],
    "vm": ["--gpus-per-node", "0"],
}


def planted_in(text: str) -> list[str]:
    return [name for name, value in PLANTED.items() if value in text]


def files_with_secrets(*folders: Path) -> list[str]:
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert files
    return [str(path) for path in files if planted_in(path.read_bytes().decode(errors="replace"))]


@pytest.mark.parametrize("target", TARGETS)
def test_no_script_contains_a_credential(cli, tmp_path, target):
    overrides = ["batch.global_rows=8", "checkpoint.path=s3://bucket/run"]
    arguments = ["launch", "smoke", *overrides, "--on", target, *TARGETS[target], "--dry-run", "--json"]
    done = cli(*arguments, **PLANTED)
    assert done.returncode == 0, done.stderr
    assert not planted_in(done.stdout + done.stderr)
    if target == "sky":
        # SkyPilot reads the values from the shell
        command = json.loads(done.stdout)["command"]
        assert [after for before, after in itertools.pairwise(command) if before == "--secret"] == [
            "HF_TOKEN",
            "WANDB_API_KEY",
        ]


@pytest.mark.faults
def test_a_job_gets_credentials_but_its_run_folder_and_log_do_not(cli, tmp_path):
    # a wrapper around the job's Python records the environment it gets
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/bash\nenv >{tmp_path}/seen.txt\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    profile = tmp_path / "cluster.yaml"
    profile.write_text(yaml.safe_dump({"venv": f"{tmp_path}/venv"}))
    with slurm_cluster(tmp_path / "slurm", nodes=1) as cluster:
        options = ["--on", "slurm", "--gpus-per-node", "0", "--profile", str(profile)]
        run = tmp_path / "run"
        small = [*SMALL_RUN, "optim.max_steps=2", "evaluate.before=false", f"output_dir={run}"]
        done = cli("launch", *small, *options, **PLANTED, **cluster.environment)
        assert done.returncode == 0, done.stdout + done.stderr
        shown = cli("status", str(run), **PLANTED, **cluster.environment)
    assert planted_in((tmp_path / "seen.txt").read_text()) == list(PLANTED)
    assert not planted_in(done.stdout + done.stderr + shown.stdout)
    assert not files_with_secrets(run)


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD"])
def test_a_profile_with_a_credential_is_rejected_without_printing_it(tmp_path, name):
    path = tmp_path / "cluster.yaml"
    path.write_text(f"environment: {{{name}: planted-value}}\n")
    with pytest.raises(ConfigError, match=f"{name} looks like a credential") as raised:
        load_profile(str(path))
    assert "planted-value" not in str(raised.value)
