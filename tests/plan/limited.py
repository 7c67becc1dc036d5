"""One rank of a real run with a limited address space from its first step on: `... MIB CONFIG [key=value ...]`.

Beyond MIB more than the process has at that point, torch's allocator really fails.
"""

import resource
import sys
from pathlib import Path
from typing import Any


def main() -> int:
    mib, *arguments = sys.argv[1:]
    from ft_dist.engine.step import Engine
    from ft_dist.train import main as train

    original = Engine.train_step

    def limited(self: Engine, *arguments: Any, **options: Any) -> Any:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + int(mib) * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        Engine.train_step = original  # type: ignore[method-assign]
        return original(self, *arguments, **options)

    Engine.train_step = limited  # type: ignore[method-assign]
    return train(arguments)


if __name__ == "__main__":
    sys.exit(main())
