"""Are the base model's weights finite? One NaN in a row of the embedding may meet no sample for hours, and is then
blamed on the learning rate."""

from pathlib import Path

import torch
from safetensors import SafetensorError

from ft_dist.config import RunConfig
from ft_dist.distributed import decided, max_over_ranks
from ft_dist.engine.step import Engine
from ft_dist.errors import ModelError, counted
from ft_dist.storage.tensors import open_tensor_file

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_finite(engine: Engine, config: RunConfig, *, folder: str) -> None:
    """Raise ModelError on every rank, naming file and tensor, if a weight is not finite.

    All ranks call it before anything is trained. It reads every weight once; under ZeRO-3 each rank reads its part.
    """
    world = engine.world
    with torch.no_grad():
        parts = [(name, _own_part(p, world.rank)) for name, p in engine.objective.model.named_parameters()]
        parts = [(name, part) for name, part in parts if part.dtype in DTYPES and not part.is_meta]
        # a sum passes on every NaN and infinity, and needs no second tensor
        sums = [part.sum(dtype=torch.float32).to(world.device) for _, part in parts]
        suspect = (~torch.stack(sums).isfinite()).nonzero().flatten().tolist() if sums else []
        bad = next((parts[at][0] for at in suspect if not parts[at][1].isfinite().all()), None)
    if not max_over_ranks(float(bad is not None), world):
        return
    place = decided(world, "finite", lambda: _in_files(Path(folder)), timeout_s=config.collective_timeout_s)
    raise ModelError(
        f"model.path={config.model.path}: {place or f'the parameter {bad} holds values'} that are not finite (NaN or "
        "infinity), so the loss could not be either. Use an intact copy of the weights."
    )


def _own_part(parameter: torch.nn.Parameter, rank: int) -> torch.Tensor:
    """What this rank holds of it, without the padding of ZeRO-3's last part; empty if it is on NVMe."""
    part = getattr(parameter, "ds_tensor", None)
    if part is None:
        return parameter
    padded_to = part.numel()
    return part.flatten()[: max(0, min(padded_to, parameter.ds_numel - rank * padded_to))]


def _in_files(folder: Path) -> str:
    """The first tensor of the folder's files that is not finite, and how many of its values are not; or ""."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with open_tensor_file(path) as file:
                for name in file.keys():  # noqa: SIM118 - not a dictionary
                    tensor = file.get_tensor(name)
                    bad = int((~tensor.isfinite()).sum()) if tensor.dtype in DTYPES else 0
                    if bad:
                        return f"{path.name}: the tensor {name} holds {counted(bad, 'value')} (of {tensor.numel():,})"
        except (OSError, SafetensorError):
            continue
    return ""
