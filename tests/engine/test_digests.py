"""Files are compared with the tensors in memory; the first difference is named."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ft_dist.engine.digests import Digest, compare_files, persistent_buffers
from ft_dist.errors import TrainingError


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return {"a": torch.randn(3, 4), "b": torch.randn(5).bfloat16(), "scale": torch.tensor(0.5)}


def test_equal_files_pass(tmp_path, tensors):
    save_file({"a": tensors["a"]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": tensors["b"], "scale": tensors["scale"]}, tmp_path / "model-00002-of-00002.safetensors")
    assert compare_files(tmp_path, tensors) == 3 * 4 * 4 + 5 * 2 + 4


def test_a_damaged_missing_or_foreign_tensor_is_named(tmp_path, tensors):
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # tensors are stored by dtype, then name: this one is b
    with pytest.raises(TrainingError, match=r"tensor b \(bfloat16 \[5\]\) differs"):
        compare_files(tmp_path, tensors)
    save_file({**tensors, "b": tensors["b"].float()}, path)
    with pytest.raises(TrainingError, match=r"tensor b \(float32 \[5\]\) differs from the trained one \(bfloat16"):
        compare_files(tmp_path, tensors)
    save_file({"a": tensors["a"], "b": tensors["b"]}, path)
    with pytest.raises(TrainingError, match="tensor scale was not written"):
        compare_files(tmp_path, tensors)
    save_file({**tensors, "c": torch.ones(1)}, path)
    with pytest.raises(TrainingError, match="holds the tensor c"):
        compare_files(tmp_path, tensors)


def test_a_view_has_the_digest_of_its_copy():
    whole = torch.arange(12.0).view(3, 4)
    assert Digest.of(whole.T) == Digest.of(whole.T.clone())
    assert Digest.of(whole.T) != Digest.of(whole)


def test_persistent_buffers_are_the_state():
    model = nn.Module()
    model.register_buffer("kept", torch.ones(2))
    model.register_buffer("recomputed", torch.ones(2), persistent=False)
    assert [name for name, _ in persistent_buffers(nn.Sequential(model))] == ["0.kept"]
