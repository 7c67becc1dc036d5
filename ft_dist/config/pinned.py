"""A run's config as its agent resolved it, for every round of its workers, so that editing the recipe changes nothing.

The agent keeps it in a file without a name, which its workers get as standard input. Nobody else can open the file, no
cleaner of /tmp removes it, and nothing is written to a folder that another run may hold.
"""

import json
import os
import tempfile
from collections.abc import Sequence
from typing import IO

from ft_dist.config.load import config_tree, load_config, validate
from ft_dist.config.schema import RunConfig

PINNED = "-"
"""In place of a recipe: standard input holds the config. Arguments behind it only tell a reader of `ps` its origin"""


def pin(config: RunConfig) -> IO[bytes]:
    """An open file that holds `config`. Pass it to processes as standard input, and close it after the last."""
    # in memory, where the system can
    memory = os.memfd_create("ft_dist-config") if hasattr(os, "memfd_create") else None
    file = tempfile.TemporaryFile() if memory is None else os.fdopen(memory, "wb")  # noqa: SIM115 - the caller closes it
    file.write(json.dumps(config_tree(config)).encode())
    file.flush()
    return file


def worker_config(arguments: Sequence[str]) -> RunConfig:
    """The config of a worker, from its command line: pinned, or RECIPE [key=value ...]. Raises ConfigError."""
    if arguments[0] != PINNED:
        return load_config(arguments[0], arguments[1:])
    # workers share the position in the file, so each reads from a place of its own
    return validate(json.loads(os.pread(0, os.fstat(0).st_size, 0)))
