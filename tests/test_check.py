"""`ft-dist check` on the folder of an earlier run refuses what a resume would refuse, in the same words."""

import pytest

from ft_dist.check import check, check_data
from ft_dist.config import load_config
from ft_dist.errors import CheckpointError, DataError
from tests.conftest import SMALL_RUN, start_cli

SETTINGS = [*(each for each in SMALL_RUN if "packing" not in each), "optim.max_steps=1"]
LIVE = "data.train=[{path: configs/emails/train.jsonl, live: true}]"


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    """The settings of two runs with a commit: one of a prepared source, one of a live one."""
    folder = tmp_path_factory.mktemp("earlier")
    runs = [[*SETTINGS, f"output_dir={folder / 'prepared'}"], [*SETTINGS, LIVE, f"output_dir={folder / 'live'}"]]
    for run in runs:
        process = start_cli("train", *run, "--nproc", "1")
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    return runs


def checked(settings, *overrides):
    config = load_config(settings[0], [*settings[1:], *overrides])
    check(config, world_size=1)
    check_data(config)


ALLOWED = ["optim.lr=0.1", "batch.global_rows=3", "engine.zero_stage=3", "data.packing=true", "optim.max_steps=5"]


@pytest.mark.parametrize("override", ALLOWED)
def test_what_a_resume_may_change_is_ready(earlier, override):
    for settings in earlier:
        checked(settings, override)


@pytest.mark.parametrize("override", ["seed=5", "data.packing=false", "data.curriculum=length", "data.max_length=400"])
def test_another_order_of_the_data_is_refused(earlier, override):
    prepared, live = earlier
    with pytest.raises(DataError, match="the checkpoint's position belongs to another order of the data: seed, "):
        checked(prepared, override)
    with pytest.raises(DataError, match=r"the checkpoint's position does not match .*train.jsonl: the source, "):
        checked(live, override)


def test_the_identity_of_the_run_is_checked(earlier):
    for settings in earlier:
        with pytest.raises(CheckpointError, match=r"method.rank=4: the checkpoint .* was made with method.rank=8"):
            checked(settings, "method.rank=4")
        with pytest.raises(CheckpointError, match="its weights differ from those of tiny-llama"):
            checked(settings, "model.path=tiny-qwen3")
        checked(settings, "method.rank=4", "output_dir=runs/another")
    folder = load_config(earlier[0][0], earlier[0][1:]).run_dir
    commit = next((folder / "checkpoints").glob("step-*"))
    with pytest.raises(CheckpointError, match=r"method\.rank=4"):
        checked(earlier[0], "method.rank=4", f"checkpoint.resume={commit}", "output_dir=runs/another")


def test_the_command_says_so(earlier, cli):
    done = cli("check", *earlier[0], "method.rank=4", "--nproc", "1")
    assert done.returncode == 2
    assert "ready to train" not in done.stdout
    assert done.stderr.strip().splitlines()[-1].startswith("ft-dist: error: method.rank=4: the checkpoint ")
