"""Which part of which parameter's training state this rank owns, for every ZeRO stage.

A fragment is a contiguous range of a flattened parameter: its fp32 master values and its optimizer state over the same
range. Every element of every trainable parameter is owned by exactly one rank; stage 0 keeps whole replicas and deals
their ownership out. A checkpoint is the set of all fragments, which is why any world size and stage can read it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ft_dist.engine.step import Engine

ADAMW_MOMENTS = ("exp_avg", "exp_avg_sq")
MUON_MOMENTS = ("momentum_buffer",)


def moments(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """The per-element states that the optimizer keeps, by torch's names for them."""
    return MUON_MOMENTS if isinstance(optimizer, torch.optim.Muon) else ADAMW_MOMENTS


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + numel) of the flattened parameter `name`; `tensors` are flat views to copy from or into.

    `tensors` has `master` (fp32) and one entry an optimizer moment; a padded tail of a partition is left out.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    owned: bool
    tensors: dict[str, torch.Tensor]


def fragments(engine: Engine) -> Iterator[Fragment]:
    """This rank's fragments, in parameter order. The optimizer's moments must exist: see `ensure_moments`."""
    fragment: Fragment | None
    for index, (name, parameter) in enumerate(engine.trainable()):
        if engine.stage == 0:
            fragment = _replicated(engine, name, parameter, owned=index % engine.world.size == engine.world.rank)
        elif engine.stage == 3:
            fragment = _partitioned(engine, name, parameter)
        else:
            fragment = _mapped(engine, name, parameter)
        if fragment is not None and fragment.numel > 0:
            yield fragment


def owned_tensors(engine: Engine) -> dict[str, torch.Tensor]:
    """What this rank has to save: `KIND/PARAMETER@START` -> flat view, in use by training. Creates missing moments."""
    ensure_moments(engine)
    return {
        f"{kind}/{fragment.name}@{fragment.start}": tensor
        for fragment in fragments(engine)
        if fragment.owned
        for kind, tensor in fragment.tensors.items()
    }


def ensure_moments(engine: Engine) -> None:
    """Create zero moments, with step 0, where the optimizer has not stepped yet: its own starting point."""
    optimizer = engine.base_optimizer
    for flat in _state_keys(engine):
        state = optimizer.state[flat]
        if not state:
            if not isinstance(optimizer, torch.optim.Muon):
                state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
            for key in moments(optimizer):
                state[key] = torch.zeros_like(flat, memory_format=torch.preserve_format)
    if engine.stage in (1, 2):
        # the map from parameters to slices of the flat state is made once; make it again for these tensors
        engine.deepspeed.optimizer._hp_optimizer_states_linked = False
        engine.deepspeed.optimizer._lazy_init_hp_params_optimizer_state()


def _state_keys(engine: Engine) -> list[torch.Tensor]:
    """The tensors that the optimizer's state is kept for: flat fp32 partitions, or whole parameters in stage 0."""
    if engine.stage == 3:
        # stage 3 lends the optimizer one partition at a time
        return list(engine.deepspeed.optimizer.fp32_partitioned_groups_flat)
    return [tensor for group in engine.base_optimizer.param_groups for tensor in group["params"]]


def adam_step(engine: Engine) -> int:
    """Updates that Adam has counted; skipped steps are not among them. A parameter without gradients counts fewer."""
    return max((int(state["step"]) for state in engine.base_optimizer.state.values() if "step" in state), default=0)


def set_adam_step(engine: Engine, step: int) -> None:
    for state in engine.base_optimizer.state.values():
        if "step" in state:
            state["step"].fill_(step)


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


def _replicated(engine: Engine, name: str, parameter: torch.nn.Parameter, *, owned: bool) -> Fragment:
    state = engine.base_optimizer.state[parameter]
    kinds = moments(engine.base_optimizer)
    tensors = {"master": parameter.data.view(-1)} | {key: state[key].view(-1) for key in kinds}
    return Fragment(name, tuple(parameter.shape), 0, parameter.numel(), owned, tensors)


def _mapped(engine: Engine, name: str, parameter: torch.nn.Parameter) -> Fragment | None:
    """Stages 1 and 2: DeepSpeed links every parameter that touches this rank's partition to its slice."""
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is None:
        return None
    address = mapping.lp_fragment_address
    kinds = moments(engine.base_optimizer)
    tensors = {"master": mapping.hp_fragment} | {key: mapping.optim_fragment[key] for key in kinds}
    return Fragment(name, tuple(parameter.shape), address.start, address.numel, True, tensors)


def _partitioned(engine: Engine, name: str, parameter: torch.nn.Parameter) -> Fragment:
    """Stage 3: rank r holds the r-th of world_size equal slices, the last ones padded."""
    optimizer = engine.deepspeed.optimizer
    group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
    slice_numel = parameter.ds_tensor.ds_numel
    start = engine.world.rank * slice_numel
    numel = max(0, min(slice_numel, parameter.ds_numel - start))
    flat = optimizer.fp32_partitioned_groups_flat[group]
    state = engine.base_optimizer.state[flat]
    sources = {"master": flat.data} | {key: state[key] for key in moments(engine.base_optimizer)}
    tensors = {key: source.narrow(0, offset, numel) for key, source in sources.items()}
    return Fragment(name, tuple(parameter.ds_shape), start, numel, True, tensors)
