"""How long a run is: epochs, max_steps, and a run that is started again after its end."""

import json
from pathlib import Path

import pytest

from ft_dist.config import dump_config, load_config
from tests.conftest import SMALL_RUN, read_lines

STEPS_IN_AN_EPOCH = 4


@pytest.fixture
def train(cli, tmp_path):
    """Train on four batches of data; returns the process."""
    lines = Path("configs/emails/train.jsonl").read_text().splitlines()[: 6 * STEPS_IN_AN_EPOCH]
    data = tmp_path / "train.jsonl"
    data.write_text("".join(f"{line}\n" for line in lines))

    def run(*overrides: str, folder: str = "run"):
        return cli("train", *SMALL_RUN, f"data.train={data}", f"output_dir={tmp_path / folder}", *overrides)

    return run


def steps(tmp_path: Path, folder: str = "run") -> int:
    return len(read_lines(tmp_path / folder / "metrics.jsonl"))


def test_max_steps_repeat_the_data_and_a_finished_run_says_so(train, tmp_path):
    done = train("optim.max_steps=9")
    assert done.returncode == 0, done.stderr
    assert "for 9 steps on" in done.stdout
    assert "about 9 steps; for this many samples" in done.stdout
    assert steps(tmp_path) == 9
    again = train("optim.max_steps=9")
    assert again.returncode == 0, again.stderr
    assert "note: the run has already finished, at step 9: optim.max_steps=9. To train longer, raise" in again.stdout
    assert train("optim.max_steps=10").returncode == 0
    assert steps(tmp_path) == 10
    # every way out that the error names works
    changed = train("optim.max_steps=11", "seed=1")
    assert changed.returncode == 2
    assert "seed, data.max_length, data.packing" in changed.stderr
    assert "Restore them, or start a new run with another output_dir" in changed.stderr
    assert train("optim.max_steps=1", "seed=1", folder="new").returncode == 0


def test_epochs_that_end_first_are_noted_and_kept_by_a_resumed_run(train, cli, tmp_path):
    """Also the resume of a run of an older version, which stored optim.epochs=1 unless the config set it."""
    done = train("optim.max_steps=9", "optim.epochs=1")
    assert done.returncode == 0, done.stderr
    assert "note: optim.epochs=1 ends the run after 4 steps, before optim.max_steps=9." in done.stdout
    assert steps(tmp_path) == STEPS_IN_AN_EPOCH
    resumed = train("optim.max_steps=9")
    assert resumed.returncode == 0, resumed.stderr
    assert "already finished, at step 4: optim.epochs=1. To train longer, raise optim.epochs" in resumed.stdout
    assert "changed since the checkpoint: optim.epochs" not in resumed.stdout
    assert steps(tmp_path) == STEPS_IN_AN_EPOCH
    state = json.loads(next((tmp_path / "run" / "checkpoints").glob("step-*/state.json")).read_text())
    assert state["config"]["optim"]["epochs"] == 1
    # the config as the run stored it, in which the epochs are the kept ones
    stored = cli("train", str(tmp_path / "run" / "config.yaml"))
    assert "already finished, at step 4" in stored.stdout
    # the note's own advice
    freed = train("optim.max_steps=9", "optim.epochs=null")
    assert freed.returncode == 0, freed.stderr
    assert steps(tmp_path) == 9


def test_a_pinned_config_does_not_set_the_epochs_that_its_recipe_leaves_open(tmp_path):
    for number, (overrides, is_set) in enumerate([([], False), (["optim.epochs=null"], True)]):
        place = tmp_path / f"{number}.yaml"
        place.write_text(dump_config(load_config("smoke", overrides)))
        again = load_config(str(place))
        assert ("epochs" in again.optim.model_fields_set) == is_set
        assert dump_config(again) == place.read_text()


@pytest.mark.parametrize(
    "overrides, epochs",
    [([], 1), (["optim.max_steps=9"], None), (["optim.max_steps=9", "optim.epochs=2"], 2), (["optim.epochs=3"], 3)],
)
def test_max_steps_alone_end_a_run_that_sets_no_epochs(overrides, epochs):
    assert load_config("smoke", ["optim.max_steps=null", *overrides]).optim.most_epochs == epochs
