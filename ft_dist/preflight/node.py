"""This node's name, from the environment; without torch, since agents use it too."""

import os
import socket


def node_name() -> str:
    """FT_DIST_NODE, SLURM's name of this node (several may share a machine), or the host's."""
    return os.environ.get("FT_DIST_NODE") or os.environ.get("SLURMD_NODENAME") or socket.gethostname()
