"""Short hashes of what must be equal on every node of a run; without torch, since agents compare them too."""

import hashlib
import importlib.util
from pathlib import Path

from ft_dist.config import RunConfig, dump_config


def config_hash(config: RunConfig) -> str:
    return hashlib.sha256(dump_config(config).encode()).hexdigest()[:12]


def code_hash() -> str:
    """Hash of the source of ft_dist and its kernels."""
    digest = hashlib.sha256()
    for package in ("ft_dist", "ft_dist_kernels"):
        found = importlib.util.find_spec(package)
        for root in map(Path, found.submodule_search_locations or [] if found else []):
            for path in sorted(root.rglob("*.py")):
                digest.update(f"{path.relative_to(root)}\0".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
