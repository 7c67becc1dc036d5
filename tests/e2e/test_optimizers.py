"""Every optimizer on every layout, including a resume from a commit."""

import pytest

from tests.conftest import SMALL_RUN, read_lines

RUN = [*SMALL_RUN, "method.kind=full", "optim.weight_decay=0.01", "checkpoint.interval_steps=5", "checkpoint.keep=9"]


def train(cli, folder, *settings, ranks, stage):
    done = cli("train", *RUN, f"output_dir={folder}", f"engine.zero_stage={stage}", *settings, "--nproc", str(ranks))
    assert done.returncode == 0, done.stderr
    return [line["loss"] for line in read_lines(folder / "metrics.jsonl")]


@pytest.mark.parametrize("kind, tolerance", [("muon", 1e-4), ("adamw_8bit", 1e-3)])
def test_states_of_other_optimizers_are_saved_and_redistributed(cli, tmp_path, kind, tolerance):
    """Matrices of odd sizes are split across ranks: an update must not depend on the split."""
    settings = [f"optim.kind={kind}", "optim.lr=1e-3"]
    losses = train(cli, tmp_path / "a", *settings, ranks=2, stage=2)
    assert losses[-1] < losses[0]
    step_5 = f"checkpoint.resume={tmp_path / 'a/checkpoints/step-00000005'}"
    assert train(cli, tmp_path / "same", *settings, step_5, ranks=2, stage=2) == losses[5:]
    redistributed = train(cli, tmp_path / "redistributed", *settings, step_5, ranks=3, stage=3)
    assert redistributed == pytest.approx(losses[5:], rel=tolerance)
    assert train(cli, tmp_path / "one", *settings, ranks=1, stage=0) == pytest.approx(losses, rel=tolerance)
