"""A folder that holds another model than the trained one is found out, by its tensors or by its loss."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from ft_dist.config.load import validate
from ft_dist.engine.digests import Digest
from ft_dist.model.builtin import resolve_model
from ft_dist.result.proof import MAX_BYTES, ProofRow, fits, loss_of, prove_final, token_budget


@pytest.fixture
def proof(tmp_path):
    """Prove a folder against tiny-llama, whose loss on one row is given."""
    base = resolve_model("tiny-llama")
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    ids = torch.arange(30) * 7 % 250
    rows = [ProofRow(ids[:-1], ids[1:])]
    with torch.no_grad():
        expected = float(model(ids[None], labels=ids[None]).loss)
    assert loss_of(model, rows) == pytest.approx(expected, rel=1e-6)
    digests = {name: Digest.of(parameter) for name, parameter in model.named_parameters()}
    tree = {"model": {"path": base, "dtype": "fp32"}, "method": {"kind": "full"}, "data": {"train": ["x.jsonl"]}}
    config = validate({**tree, "output_dir": str(tmp_path)})
    folder = shutil.copytree(base, tmp_path / "final")

    def prove():
        options = {"config": config, "base": base, "vocabulary": 260, "rows": rows, "trained_loss": expected}
        return prove_final(folder, digests, **options)

    return folder, model, prove


def test_the_same_model_passes(proof):
    _, _, prove = proof
    found = prove()
    assert (found["reloaded"], found["agrees"], found["samples"], found["labelled_tokens"]) == (True, True, 1, 29)


def test_a_differing_tensor_is_named(proof):
    folder, model, prove = proof
    model.model.norm.weight.data[3] += 1e-6
    model.save_pretrained(folder)
    found = prove()
    assert (found["changed"], found["agrees"]) == (["model.norm.weight"], False)


def test_equal_tensors_that_compute_something_else_are_found(proof):
    folder, _, prove = proof
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert prove()["agrees"] is False


def test_a_folder_that_does_not_load_is_reported(proof):
    folder, _, prove = proof
    (folder / "config.json").write_text("{}")
    assert (prove()["reloaded"], "did not load again" in prove()["reason"]) == (False, True)


def test_large_models_are_not_loaded_again():
    assert "up to 32 GiB are loaded again" in str(fits(MAX_BYTES + 1))
    assert fits(1 << 20) is None
    assert token_budget(8_000_000_000) == 250
    assert token_budget(100_000) == 4096
