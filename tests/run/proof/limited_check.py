"""`ft-dist check --model` with a limited address space once weights load: `... MIB CONFIG [key=value ...]`.

Beyond MIB more than the process has at that point, torch's allocator really fails.
"""

import resource
import sys
from pathlib import Path
from typing import Any

import ft_dist.run.proof.check_model as checking
from ft_dist.config import load_config
from ft_dist.engine.build import build_engine, prepare_deepspeed


def main() -> None:
    mib, *arguments = sys.argv[1:]

    def limited(*arguments: Any, **options: Any) -> Any:
        prepare_deepspeed()
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + int(mib) * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        return build_engine(*arguments, **options)

    checking.build_engine = limited
    print("\n".join(checking.check_model(load_config(arguments[0], arguments[1:]), weights=True)))


if __name__ == "__main__":
    main()
