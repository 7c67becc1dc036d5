"""A base model with NaN or infinity in any weight is refused before step 1, with the file and the tensor."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from ft_dist.model.tiny import make_tiny
from tests.conftest import SMALL_RUN


def damaged_model(folder, value):
    make_tiny("tiny-llama", folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    # a row that no sample of the self-check reads
    name = "model.embed_tokens.weight"
    tensors[name][-1, :3] = value
    save_file(tensors, path, metadata={"format": "pt"})
    return f"model.safetensors: the tensor {name} holds 3 values (of {tensors[name].numel():,}) that are not finite"


@pytest.mark.faults
@pytest.mark.parametrize(("value", "stage"), [(torch.nan, 2), (torch.inf, 3)])
def test_train_and_check_name_the_tensor_before_the_first_step(cli, tmp_path, value, stage):
    said = damaged_model(tmp_path / "model", value)
    options = [*SMALL_RUN, f"model.path={tmp_path / 'model'}", f"engine.zero_stage={stage}"]
    run = tmp_path / "run"
    done = cli("train", *options, f"output_dir={run}", "--nproc", "2")
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert said in line
    assert "optim.lr" not in done.stderr
    assert not (run / "metrics.jsonl").exists()
    checked = cli("check", *options, f"output_dir={run}", "--model", "--nproc", "1")
    assert checked.returncode == 2, checked.stdout
    assert said in checked.stderr
