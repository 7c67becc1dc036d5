"""One rank of `ft-dist check --env`: runs all checks, reports every problem, exits 2 if there is one."""

import contextlib
import os
import sys

from ft_dist.config import worker_config
from ft_dist.distributed import join_world, leave_world
from ft_dist.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_USER, PreflightError, TrainingError, UserError
from ft_dist.network.open import open_store, several_nodes
from ft_dist.observe.console import Console, print_error
from ft_dist.preflight.interface import choose_interface
from ft_dist.preflight.node import node_name
from ft_dist.preflight.ranks import Preflight

TIMEOUT_S = 60.0


def main(arguments: list[str]) -> int:
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    console = Console(enabled=rank == 0)
    try:
        config = worker_config(arguments)
        existed = config.run_dir.exists()
        choose_interface(node=node_name(), several_nodes=several_nodes())
        store = open_store(timeout_s=TIMEOUT_S)
        preflight = Preflight(config, store, rank=rank, size=size, timeout_s=TIMEOUT_S, say=console.say)
        try:
            preflight.compare()
            world = join_world(store, timeout_s=TIMEOUT_S)
            console.say(preflight.measure(world, speed=True) if size > 1 else "preflight: only one rank")
        except PreflightError:
            # every problem is printed below
            if not preflight.found:
                raise
        finally:
            if rank == 0 and not existed:
                with contextlib.suppress(OSError):
                    config.run_dir.rmdir()
        for problem in preflight.found:
            console.say(f"problem: {problem.line}")
        return EXIT_USER if preflight.found else EXIT_FINISHED
    except (UserError, TrainingError) as error:
        print_error(str(error))
        return EXIT_USER if isinstance(error, UserError) else EXIT_FAILED
    finally:
        leave_world()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
