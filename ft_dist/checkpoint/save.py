"""Write one commit: every rank its own fragments, rank 0 the manifest, last."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from ft_dist.checkpoint import format as layout
from ft_dist.distributed import barrier
from ft_dist.engine.fragments import adam_step, ensure_moments, fragments
from ft_dist.engine.step import Engine


def save(engine: Engine, root: Path, *, step: int, state: dict[str, Any], keep: int) -> Path:
    """Commit the training state after `step`, then delete all but the newest `keep` commits.

    `state` is what the loop needs beside the weights (JSON). All ranks call it. Returns the folder.
    """
    world = engine.world
    folder = layout.step_folder(root, step)
    if world.is_main:
        # left over from a save that was interrupted, or from steps that a resumed run repeats
        layout.remove(folder)
        folder.mkdir(parents=True)
        layout.sync_folder(root)
    barrier(world)
    ensure_moments(engine)
    tensors = {
        f"{kind}/{fragment.name}@{fragment.start}": tensor.detach().float().cpu().contiguous()
        for fragment in fragments(engine)
        if fragment.owned
        for kind, tensor in fragment.tensors.items()
    }
    path = layout.rank_file(folder, world.rank)
    save_file(tensors, path)
    layout.sync_file(path)
    barrier(world)
    if world.is_main:
        shapes = {name: list(getattr(p, "ds_shape", p.shape)) for name, p in engine.trainable()}
        full = state | {"step": step, "adam_step": adam_step(engine), "parameters": shapes}
        layout.write_synced(folder / "state.json", json.dumps(full, indent=1))
        layout.write_manifest(folder, step)
        for old in layout.commits(root)[:-keep]:
            layout.remove(old.folder)
    barrier(world)
    return folder
