"""The restart loop of a plain VM: a machine is lost without notice, and another one resumes from the bucket."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ft_dist.launcher.launch import plan_submission
from ft_dist.launcher.options import make_request
from tests.conftest import CLI, ROOT, SMALL_RUN, read_lines
from tests.object_store import object_store

SETTINGS = ["optim.max_steps=30", "optim.epochs=3", "checkpoint.interval_steps=3", "evaluate.before=false"]


@pytest.mark.faults
def test_another_machine_resumes_from_the_bucket(tmp_path):
    profile = tmp_path / "machine.yaml"
    profile.write_text(f"venv: {Path(sys.executable).parent.parent}\n")
    with object_store(tmp_path / "store") as store:
        recipe, *small = SMALL_RUN
        request = make_request(
            recipe,
            [*small, *SETTINGS, f"checkpoint.path={store.url}/run", "output_dir=out"],
            target="vm",
            nodes="1",
            gpus_per_node=0,
            nproc=1,
            profile=str(profile),
            sweep=[],
            rdzv=None,
            max_restarts=3,
        )
        script = tmp_path / "vm.sh"
        script.write_text(plan_submission(request).text())

        def machine(name: str) -> subprocess.Popen[bytes]:
            environment = os.environ | store.environment | {"FT_DIST_HOME": str(tmp_path / name)}
            environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'kernels'}"
            return subprocess.Popen(["bash", str(script)], env=environment, start_new_session=True)

        first = machine("first")
        deadline = time.monotonic() + 300
        while not list(store.folder.glob("run/step-*/manifest.json")):
            assert first.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        # the loop and the agent; the workers end with their agent
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
        assert machine("second").wait(300) == 0
    folder = tmp_path / "second" / "ft-out" / "out"
    whole = tmp_path / "whole"
    command = [*CLI, "train", *SMALL_RUN, *SETTINGS, f"output_dir={whole}", "--nproc", "1"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    steps = [(line["step"], line["loss"]) for line in read_lines(folder / "metrics.jsonl")]
    assert steps[0][0] > 1
    assert steps == [(line["step"], line["loss"]) for line in read_lines(whole / "metrics.jsonl")][steps[0][0] - 1 :]
