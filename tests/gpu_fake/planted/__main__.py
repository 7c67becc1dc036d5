"""Faults planted on purpose: prints one line per fault, with the simulation's finding.

    python -m tests.gpu_fake.planted [--json FILE]

A check that cannot fail proves nothing: `test_planted.py` reads these lines.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.gpu_fake.simulator import device


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_fake.planted", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    device.simulate()
    from tests.gpu_fake.simulator.counting import Count

    said = {}
    for name, fault in _faults().items():
        with device.fake_tensors(), Count() as count:
            try:
                fault()
                said[name] = ", ".join(f"{times} x {kind}" for (kind, _), times in count.now.waits.items())
            except Exception as problem:  # any source of the error
                said[name] = f"{type(problem).__name__}: {problem}"
    for name, line in said.items():
        print(f"{name}: {line}")
    if options.json:
        options.json.write_text(json.dumps(said), encoding="utf-8")
    return 0


def _faults() -> dict[str, Callable[[], Any]]:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from tests.gpu_fake.planted.kernels import add_one, counts_in_64_bits, square

    def on_device(*shape: int, dtype: Any = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda")

    def heads(count: int) -> torch.Tensor:
        return on_device(1, count, 16, 64, dtype=torch.bfloat16)

    def mask() -> torch.Tensor:
        return on_device(1, 1, 16, 16, dtype=torch.bool)

    return {
        "shared memory": lambda: square[(1,)](on_device(128, 512), on_device(128, 128), 512, SIDE=128, STEP=128),
        "argument on the host": lambda: add_one[(1,)](torch.empty(16), 16, BLOCK=16),
        "grid too large": lambda: add_one[(1, 70_000)](on_device(16), 16, BLOCK=16),
        "grid of nothing": lambda: add_one[(0,)](on_device(16), 16, BLOCK=16),
        "does not compile at 1": lambda: counts_in_64_bits[(1,)](on_device(16), 1, BLOCK=16),
        "mask with groups": lambda: scaled_dot_product_attention(heads(4), heads(2), heads(2), mask(), enable_gqa=True),
        "value read": lambda: on_device(3).sum().item(),
        "values read": lambda: on_device(3).tolist(),
        "size read": lambda: on_device(3).nonzero(),
        "mask as index": lambda: on_device(4, 2)[on_device(4) > 0],
        "copy that waits": lambda: torch.empty(3).to("cuda"),
        "copy that does not": lambda: torch.empty(3).to("cuda", non_blocking=True),
        "wait by name": lambda: torch.cuda.synchronize(),
    }


if __name__ == "__main__":
    sys.exit(main())
