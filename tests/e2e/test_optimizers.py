"""Every optimizer on every layout, from its checkpoints too."""

import pytest

from tests.conftest import SMALL_RUN, read_lines

RUN = [*SMALL_RUN, "method.kind=full", "optim.weight_decay=0.01", "checkpoint.interval_steps=5", "checkpoint.keep=9"]


def train(cli, folder, *settings, ranks, stage):
    done = cli("train", *RUN, f"output_dir={folder}", f"engine.zero_stage={stage}", *settings, "--nproc", str(ranks))
    assert done.returncode == 0, done.stderr
    return [line["loss"] for line in read_lines(folder / "metrics.jsonl")]


@pytest.mark.parametrize("kind, tolerance", [("muon", 1e-4), ("adamw_8bit", 1e-3)])
def test_states_of_other_optimizers_are_saved_and_dealt_anew(cli, tmp_path, kind, tolerance):
    """Matrices of odd sizes lie across ranks: an update must not depend on where they are cut."""
    settings = [f"optim.kind={kind}", "optim.lr=1e-3"]
    losses = train(cli, tmp_path / "a", *settings, ranks=2, stage=2)
    assert losses[-1] < losses[0]
    step_5 = f"checkpoint.resume={tmp_path / 'a/checkpoints/step-00000005'}"
    assert train(cli, tmp_path / "same", *settings, step_5, ranks=2, stage=2) == losses[5:]
    dealt_anew = train(cli, tmp_path / "anew", *settings, step_5, ranks=3, stage=3)
    assert dealt_anew == pytest.approx(losses[5:], rel=tolerance)
    assert train(cli, tmp_path / "one", *settings, ranks=1, stage=0) == pytest.approx(losses, rel=tolerance)
