"""What the environment says of this node; without torch, for agents ask too."""

import os
import socket


def node_name() -> str:
    """FT_DIST_NODE, SLURM's name of this node (several may share a machine), or the host's."""
    return os.environ.get("FT_DIST_NODE") or os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def several_nodes() -> bool:
    """As the launcher says; torchrun and ours name the same variable."""
    return int(os.environ.get("GROUP_WORLD_SIZE", os.environ.get("SLURM_NNODES", "1"))) > 1
