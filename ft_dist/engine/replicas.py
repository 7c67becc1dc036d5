"""Whether every rank computes with the same weights. Faulty memory, a faulty link or a wrong collective changes a copy.

Each rank computes a checksum of its weights where they are, and the ranks compare these numbers. At ZeRO stages 0 to 2
every rank holds all weights. Stage 3 gathers them from one copy when it needs them: there is nothing to compare.
"""

from collections import Counter

import torch
import xxhash
from torch import Tensor, nn

from ft_dist.distributed import World, gather
from ft_dist.errors import TrainingError
from ft_dist.model.fp8 import FP8Linear
from ft_dist.preflight.node import node_name

PART = 2**20
"""Elements that are summed with the same factor"""
FACTOR = 6364136223846793005
"""Of Knuth's MMIX generator: odd, so that no tensor's checksum loses bits"""
NAME_BYTES = 64
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def verify_replicas(model: nn.Module, world: World, *, step: int) -> None:
    """Compare the weights of all ranks, which all call this. Raises TrainingError on every rank if one differs."""
    if world.size == 1:
        return
    own = torch.tensor([_checksum(model)])
    sums = gather(own, world).flatten().tolist()
    if len(set(sums)) == 1:
        return
    name = torch.tensor(list(node_name().encode()[:NAME_BYTES].ljust(NAME_BYTES)), dtype=torch.uint8)
    hosts = [bytes(row.tolist()).decode(errors="replace").rstrip() for row in gather(name, world)]
    raise TrainingError(
        f"step {step}: {_who_differs(sums, hosts)} (engine.verify_steps). Memory, a GPU or a link changed them, or the "
        "machines compute differently. Exclude the machine, and run again: it resumes from the last commit."
    )


def _who_differs(sums: list[int], hosts: list[str]) -> str:
    """The ranks outside the majority, or all groups of equal ranks if there is none."""
    (most, count), *_ = Counter(sums).most_common()
    named = [f"rank {rank} on {host}" for rank, host in enumerate(hosts)]
    if 2 * count > len(sums):
        odd = [who for who, value in zip(named, sums, strict=True) if value != most]
        return f"the weights of {', '.join(odd)} differ from those of the other {count} ranks"
    groups = [" and ".join(who for who, value in zip(named, sums, strict=True) if value == one) for one in set(sums)]
    return f"the weights differ between ranks: {'; '.join(sorted(groups))}"


def _checksum(model: nn.Module) -> int:
    """Of all weights, frozen ones too, modulo 2**64, as an int64."""
    tensors = [parameter.detach() for parameter in model.parameters()]
    # several layers may share a matrix
    matrices = {id(m.weight.matrix): m.weight.matrix for m in model.modules() if isinstance(m, FP8Linear)}
    tensors += [tensor for matrix in matrices.values() for tensor in matrix]
    on_devices = [sum_of_bits(tensor) for tensor in tensors if not tensor.is_cpu]
    values = torch.stack(on_devices).tolist() if on_devices else []
    values += [xxhash.xxh3_64_intdigest(_as_bytes(tensor).numpy()) for tensor in tensors if tensor.is_cpu]
    total = 0
    for value in values:
        total = (total * FACTOR + value + 1) % 2**64
    return total - 2**63


def sum_of_bits(tensor: Tensor) -> Tensor:
    """A checksum that is computed where the tensor is and read later: (), int64.

    The elements as integers, summed with an odd factor per PART of them, modulo 2**64; so any changed bit changes it.
    """
    flat = tensor.contiguous().view(-1).view(INTEGERS[tensor.element_size()])
    # in parts, since torch converts all that it sums to int64
    sums = [part.sum(dtype=torch.int64) * (2 * index + 1) for index, part in enumerate(flat.split(PART))]
    return torch.stack(sums).sum()


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
