"""Digests of tensors: what was written compared with what is in memory, one tensor at a time."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from torch import Tensor, nn

from ft_dist.errors import TrainingError
from ft_dist.storage.tensors import open_tensor_file


@dataclass(frozen=True, slots=True)
class Digest:
    """What identifies a tensor's contents: dtype, shape and the XXH3 (128 bits) of its bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    xxh3: str

    @classmethod
    def of(cls, tensor: Tensor) -> "Digest":
        """Of a tensor on any device."""
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return cls(tensor.dtype, tuple(tensor.shape), xxhash.xxh3_128_hexdigest(content))

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that belong to the model's state, by name: a router's correction bias, a layer's scale."""
    saved = model.state_dict().keys()
    return ((name, buffer) for name, buffer in model.named_buffers() if name in saved)


def compare_files(folder: Path, expected: Mapping[str, Tensor]) -> int:
    """Read every safetensors file of `folder` back and compare each tensor with `expected`; returns their bytes.

    Raises TrainingError naming the first tensor that is missing, not expected, or different.
    """
    found, nbytes = set(), 0
    for path in sorted(folder.glob("*.safetensors")):
        with open_tensor_file(path) as file:
            for name in file.keys():  # noqa: SIM118 - not a dictionary
                if name not in expected:
                    raise TrainingError(f"{path.name}: holds the tensor {name}, which the trained model does not have")
                written, trained = file.get_tensor(name), expected[name]
                if Digest.of(written) != Digest.of(trained):
                    raise TrainingError(
                        f"{path.name}: the tensor {name} ({Digest.of(written)}) differs from the trained one "
                        f"({Digest.of(trained)})"
                    )
                found.add(name)
                nbytes += written.nbytes
    missing = sorted(expected.keys() - found)
    if missing:
        raise TrainingError(f"the tensor {missing[0]} was not written ({len(missing)} of {len(expected)} are missing)")
    return nbytes
