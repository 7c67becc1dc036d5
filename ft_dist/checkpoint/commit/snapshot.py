"""Copies one rank's training state to the host: the only part of a save that training waits for.

The copy has the layout of a safetensors file (https://github.com/huggingface/safetensors#format), so writing it is one
pass over memory, checksum included, without a second copy.
"""

import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import xxhash

from ft_dist.checkpoint.commit.format import Fingerprint

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_BLOCK_BYTES = 1 << 24


class TensorSource(Protocol):
    """A tensor, or a value stored in another form and widened only when copied."""

    dtype: torch.dtype

    @property
    def shape(self) -> Sequence[int]: ...
    @property
    def nbytes(self) -> int: ...
    def element_size(self) -> int: ...
    def detach(self) -> torch.Tensor: ...


@dataclass(frozen=True)
class Snapshot:
    """The header and the data (uint8) of a safetensors file. The `HostBuffer` that created it owns the data."""

    header: bytes
    data: torch.Tensor

    @property
    def size_bytes(self) -> int:
        return len(self.header) + self.data.numel()

    def write(self, path: Path) -> Fingerprint:
        """Write and sync the file; returns its fingerprint, computed from memory. Raises OSError."""
        digest = xxhash.xxh3_128()
        data = memoryview(self.data.numpy())
        blocks = [memoryview(self.header), *(data[at : at + _BLOCK_BYTES] for at in range(0, len(data), _BLOCK_BYTES))]
        # torch, xxhash and file writes of this size release the interpreter's lock
        with path.open("wb") as file:
            for block in blocks:
                digest.update(block)
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        return {"bytes": self.size_bytes, "xxh3": digest.hexdigest()}


class HostBuffer:
    """Host memory for one snapshot, reused by every save; pinned if the tensors are on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._device = device
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._stream = torch.cuda.Stream(device) if self._pinned else None

    @torch.no_grad()
    def snapshot(self, tensors: Mapping[str, TensorSource]) -> Snapshot:
        """Copy `tensors` by name, of any dtype and device. Overwrites the previous snapshot.

        On a GPU the copies run on a separate stream, after the work queued so far and concurrently with training.
        """
        if self._stream is None:
            return self._copy(tensors)
        self._stream.wait_stream(torch.cuda.default_stream(self._device))
        with torch.cuda.stream(self._stream):
            return self._copy(tensors)

    def _copy(self, tensors: Mapping[str, TensorSource]) -> Snapshot:
        # wide types first, so that every tensor starts at a multiple of its item size
        named = sorted(tensors.items(), key=lambda item: -item[1].element_size())
        total = sum(tensor.nbytes for _, tensor in named)
        if self._memory.numel() < total:
            self._memory = torch.empty(0, dtype=torch.uint8)  # free the old one first
            self._memory = torch.empty(total, dtype=torch.uint8, pin_memory=self._pinned)
        entries, at = {}, 0
        for name, tensor in named:
            end = at + tensor.nbytes
            entries[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
            place = self._memory[at:end].view(tensor.dtype).view(tensor.shape)
            place.copy_(tensor.detach(), non_blocking=self._pinned)
            at = end
        if self._stream is not None:
            self._stream.synchronize()
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return Snapshot(struct.pack("<Q", len(text)) + text, self._memory[:total])
