"""Which parts of the parameters' training state this rank owns, for every ZeRO stage.

A fragment is a contiguous range of a flattened parameter: its fp32 master values and its optimizer state over the same
range. Exactly one rank owns each element of each trainable parameter; stage 0 keeps full replicas and assigns
ownership. A checkpoint is the set of all fragments, so any world size and stage can read it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ft_dist.engine.step import Engine
from ft_dist.optim.adamw_8bit import AdamW8bit, Moment
from ft_dist.optim.partition import PartitionedOptimizer, Segment

ADAMW_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """A segment of a parameter with its state: `master` (fp32) and one entry per optimizer moment.

    The tensors are flat views to copy from or into; 8-bit moments are read and written in fp32.
    """

    segment: Segment
    tensors: dict[str, torch.Tensor | Moment]


def fragments(engine: Engine) -> Iterator[Fragment]:
    """This rank's fragments. Creates missing optimizer moments as zeros with step 0."""
    optimizer = engine.base_optimizer
    for flat, group, segments in _flats(engine):
        state = _moments(optimizer, flat, group)
        for segment in segments:
            if isinstance(optimizer, AdamW8bit):
                kept = {key: state[key, segment.offset] for key in ADAMW_MOMENTS}
            else:
                kept = {key: segment.of(value) for key, value in state.items() if key != "step"}
            yield Fragment(segment, {"master": segment.of(flat.data)} | kept)


def owned_tensors(engine: Engine) -> dict[str, torch.Tensor | Moment]:
    """The tensors that this rank saves: `KIND/PARAMETER@START` to a flat view that training uses."""
    return {
        f"{kind}/{fragment.segment.name}@{fragment.segment.start}": tensor
        for fragment in fragments(engine)
        if fragment.segment.owned
        for kind, tensor in fragment.tensors.items()
    }


def adam_step(engine: Engine) -> int:
    """Updates counted by the optimizer, without skipped steps."""
    return max((int(state["step"]) for state in engine.base_optimizer.state.values() if "step" in state), default=0)


def set_adam_step(engine: Engine, step: int) -> None:
    for state in engine.base_optimizer.state.values():
        state["step"].fill_(step)


def hold_contents(engine: Engine) -> None:
    """Pass the contents of the flat tensors to an optimizer that needs them."""
    optimizer = engine.base_optimizer
    if isinstance(optimizer, PartitionedOptimizer):
        optimizer.hold({flat: held for flat, _, held in _flats(engine)})


def _moments(optimizer: torch.optim.Optimizer, flat: torch.Tensor, group: dict[str, Any]) -> dict[Any, Any]:
    if isinstance(optimizer, PartitionedOptimizer):
        return optimizer.moments(flat, group)
    state = optimizer.state[flat]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
        for key in ADAMW_MOMENTS:
            state[key] = torch.zeros_like(flat, memory_format=torch.preserve_format)
    return state


def _flats(engine: Engine) -> Iterator[tuple[torch.Tensor, dict[str, Any], list[Segment]]]:
    """The tensors that have optimizer state, their parameter groups, and the segments in each.

    These are flat fp32 partitions, or whole parameters in stage 0; in the same order on every rank.
    """
    groups = engine.base_optimizer.param_groups
    names = {parameter: name for name, parameter in engine.trainable()}
    if engine.stage == 0:
        order = {name: index for index, (name, _) in enumerate(engine.trainable())}
        for group in groups:
            for parameter in group["params"]:
                yield parameter, group, [_replicated(engine, names[parameter], parameter, order[names[parameter]])]
        return
    optimizer = engine.deepspeed.optimizer
    if engine.stage == 3:
        for index, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
            held = [
                _partitioned(engine, names[parameter], parameter, flat) for parameter in optimizer.fp16_groups[index]
            ]
            group = groups[optimizer.sub_group_to_group_id[index]]
            yield flat, group, [segment for segment in held if segment.numel > 0]
        return
    if hasattr(optimizer, "fp32_groups_flat_partition"):  # bf16 in stage 1
        partitions, members = optimizer.fp32_groups_flat_partition, optimizer.bf16_groups
    else:
        partitions, members = optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups
    for index, flat in enumerate(partitions):
        held = [_mapped(names[parameter], parameter, flat) for parameter in members[index]]
        yield flat, groups[index], [segment for segment in held if segment.numel > 0]


def _replicated(engine: Engine, name: str, parameter: torch.nn.Parameter, index: int) -> Segment:
    """Stage 0: every rank holds everything; each copy to save is assigned to one rank."""
    owned = index % engine.world.size == engine.world.rank
    return Segment(name, tuple(parameter.shape), 0, parameter.numel(), parameter, 0, owned)


def _mapped(name: str, parameter: torch.nn.Parameter, flat: torch.Tensor) -> Segment:
    """Stages 1 and 2: DeepSpeed maps every parameter that touches this rank's partition to its slice."""
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is None:
        return Segment(name, tuple(parameter.shape), 0, 0, flat, 0)
    here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Segment(name, tuple(parameter.shape), here.start, here.numel, flat, there.start)


def _partitioned(engine: Engine, name: str, parameter: torch.nn.Parameter, flat: torch.Tensor) -> Segment:
    """Stage 3: rank r holds the r-th of world_size equal slices, the last ones padded."""
    optimizer = engine.deepspeed.optimizer
    _, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
    slice_numel = parameter.ds_tensor.ds_numel
    start = engine.world.rank * slice_numel
    numel = max(0, min(slice_numel, parameter.ds_numel - start))
    return Segment(name, tuple(parameter.ds_shape), start, numel, flat, offset)


@torch.no_grad()
def refresh_compute_weights(engine: Engine) -> None:
    """Copy the master values into the weights that the forward pass reads, on every rank."""
    optimizer = engine.deepspeed.optimizer
    if engine.stage in (1, 2):
        _refresh_gathered(engine)
    elif engine.stage == 3:
        optimizer._partition_all_parameters()
        for sub_group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def _refresh_gathered(engine: Engine) -> None:
    optimizer = engine.deepspeed.optimizer
    if hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
        return
    from deepspeed.runtime.utils import all_gather_dp_groups

    for index, master in enumerate(optimizer.single_partition_of_fp32_groups):
        rank = torch.distributed.get_rank(optimizer.real_dp_process_group[index])
        optimizer.parallel_partitioned_bit16_groups[index][rank].data.copy_(master.data)
    all_gather_dp_groups(
        groups_flat=optimizer.bit16_groups_flat,
        partitioned_param_groups=optimizer.parallel_partitioned_bit16_groups,
        dp_process_group=optimizer.real_dp_process_group,
        start_alignment_factor=optimizer.nccl_start_alignment_factor,
        allgather_bucket_size=optimizer.allgather_bucket_size,
    )
    for index in range(len(optimizer.bit16_groups)):
        optimizer._update_model_bit16_weights(index)
