"""The configuration tree, how it is read, and how mistakes in it are told."""

from ft_dist.config.load import (
    dump_config,
    find_recipe,
    json_schema,
    load_config,
    recipe_folder,
    shipped_folder,
    validate,
)
from ft_dist.config.schema import RunConfig

__all__ = [
    "RunConfig",
    "dump_config",
    "find_recipe",
    "json_schema",
    "load_config",
    "recipe_folder",
    "shipped_folder",
    "validate",
]
