"""Each family that our kernels support, with each method: packed rows, then a rank without rows.

    python -m tests.gpu_fake.family_cases [FAMILY ...] [--json FILE]

Exits 1 if one of them fails.
"""

import argparse
import json
import sys
import traceback
from pathlib import Path
from typing import Any

from tests.gpu_fake.simulator import device


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_fake.family_cases", description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help="all by default")
    parser.add_argument("--methods", nargs="*", help="all by default")
    parser.add_argument("--stages", nargs="*", type=int, default=[None])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    device.simulate()
    from tests.gpu_fake.step import FAMILY_MODELS, METHODS

    rows = [
        run(family, method, stage=stage, ranks=options.ranks)
        for stage in options.stages
        for family in options.families or FAMILY_MODELS
        for method in options.methods or METHODS
    ]
    failed = [row for row in rows if row["error"]]
    for row in rows:
        print(f"{row['family']} {row['method']}: {row['error'] or row['kernels']}")
    if options.json:
        options.json.write_text(json.dumps(rows), encoding="utf-8")
    return 1 if failed else 0


def run(family: str, method: str, *, stage: int | None, ranks: int) -> dict[str, Any]:
    """Two steps: packed rows with a dummy micro-batch, and the dummy alone."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    from tests.gpu_fake import step
    from tests.gpu_fake.simulator.counting import Count

    row: dict[str, Any] = {"family": family, "method": method, "stage": stage, "error": "", "kernels": ""}
    setting = step.Setting(
        step.FAMILY_MODELS[family], method, stage=stage, ranks=ranks, rows=2, length=512, lengths="60", labelled=0.5
    )
    try:
        with device.fake_tensors(), Count():
            engine, config = step.build(setting)
            row |= {"kernels": engine.kernels, "stage": engine.stage}
            with unset_fake_temporarily():
                real, dummy = next(step.batches(setting, config)), step.dummy(config)
            for micro_batches in ([*real, dummy], [dummy]):
                engine.train_step(micro_batches, weight=100, learning_rate=step.LEARNING_RATE)
    except Exception as problem:  # any error of torch, DeepSpeed or a compiler
        where = traceback.extract_tb(problem.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        row["error"] = f"{type(problem).__name__} at {place}: {(str(problem).strip().splitlines() or [''])[-1][:300]}"
    return row


if __name__ == "__main__":
    sys.exit(main())
