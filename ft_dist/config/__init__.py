"""The configuration tree, how it is read, and how errors in it are reported."""

from ft_dist.config.load import (
    dump_config,
    find_recipe,
    json_schema,
    load_config,
    recipe_folder,
    shipped_folder,
    validate,
)
from ft_dist.config.pinned import PINNED, pin, worker_config
from ft_dist.config.schema import RunConfig

__all__ = [
    "PINNED",
    "RunConfig",
    "dump_config",
    "find_recipe",
    "json_schema",
    "load_config",
    "pin",
    "recipe_folder",
    "shipped_folder",
    "validate",
    "worker_config",
]
