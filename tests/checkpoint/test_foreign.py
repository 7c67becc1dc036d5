"""Checkpoints of other trainers are read exactly, without executing their content."""

import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from ft_dist.checkpoint.foreign.read import read_foreign
from ft_dist.checkpoint.inspect import compared
from ft_dist.errors import CheckpointError
from tests.conftest import ROOT, SMALL_RUN
from tests.ports import free_port

SHAPES = {"a.weight": [4, 3], "a.bias": [4], "b.weight": [2, 4]}


def trained(folder, *, grouped):
    """Write the Trainer's files of a small model after two real AdamW steps; returns the optimizer's states."""
    torch.manual_seed(0)
    weights = {name: torch.nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}
    matrices = [p for p in weights.values() if p.ndim == 2]
    vectors = [p for p in weights.values() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups if grouped else [{"params": list(weights.values())}], lr=0.1)
    for _ in range(2):
        sum((p**3).sum() for p in weights.values()).backward()
        optimizer.step()
    save_file({name: p.detach() for name, p in weights.items()}, folder / "model.safetensors")
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 2, "epoch": 0.5}))
    return weights, optimizer


@pytest.mark.parametrize("grouped", [True, False])
def test_hugging_face_trainer(tmp_path, grouped):
    weights, optimizer = trained(tmp_path, grouped=grouped)
    found = read_foreign(tmp_path, SHAPES, no_decay=grouped)
    assert (found.step, found.adam_step) == (2, 2)
    for name, parameter in weights.items():
        assert torch.equal(found.tensors[name]["master"], parameter.detach().view(-1))
        for kind in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(found.tensors[name][kind], optimizer.state[parameter][kind].view(-1))


def test_states_that_do_not_fit_are_refused(tmp_path):
    trained(tmp_path, grouped=True)
    with pytest.raises(CheckpointError, match=r"optim\.weight_decay"):
        read_foreign(tmp_path, SHAPES, no_decay=False)
    with pytest.raises(CheckpointError, match=r"has no c\.weight"):
        read_foreign(tmp_path, {**SHAPES, "c.weight": [2]}, no_decay=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="neither a DeepSpeed checkpoint"):
        read_foreign(tmp_path / "empty", SHAPES, no_decay=True)


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_a_pickle_that_would_execute_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained(tmp_path, grouped=True)
    with (tmp_path / "optimizer.pt").open("wb") as file:
        pickle.dump(Evil(), file)
    with pytest.raises(CheckpointError, match=r"optimizer\.pt: refused"):
        read_foreign(tmp_path, SHAPES, no_decay=True)
    torch.save({"state": Evil()}, tmp_path / "optimizer.pt")
    with pytest.raises(CheckpointError, match=r"optimizer\.pt: refused"):
        read_foreign(tmp_path, SHAPES, no_decay=True)
    assert not (tmp_path / "executed").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage, kind", [(0, "full"), (1, "lora"), (2, "full"), (3, "full"), (3, "lora")])
def test_deepspeed(cli, tmp_path, stage, kind):
    """DeepSpeed's checkpoint imports equal to our own commit of the same state, and training resumes from it."""
    overrides = [*SMALL_RUN, f"engine.zero_stage={stage}", f"method.kind={kind}"]
    script = [sys.executable, "-m", "tests.checkpoint.save_both_ways"]
    port = str(free_port())
    workers = [
        subprocess.Popen(
            [*script, str(tmp_path / "theirs"), *overrides, "optim.max_steps=2", f"output_dir={tmp_path}/ours"],
            cwd=ROOT,
            env=os.environ
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": f"{ROOT}:{ROOT}/kernels"},
        )
        for rank in range(2)
    ]
    assert [worker.wait(timeout=300) for worker in workers] == [0, 0]
    done = cli("checkpoint", "import", str(tmp_path / "theirs"), *overrides, f"output_dir={tmp_path}/imported")
    assert done.returncode == 0, done.stderr
    found = compared(tmp_path / "ours", tmp_path / "imported")
    assert set(found["tensors"]) == {"master", "exp_avg", "exp_avg_sq"}
    assert all(kind["largest"] == 0 and kind["equal"] == kind["of"] > 0 for kind in found["tensors"].values())
    resumed = cli("train", *overrides, "optim.max_steps=3", f"output_dir={tmp_path}/imported", "--nproc", "1")
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed from step 2" in resumed.stdout
