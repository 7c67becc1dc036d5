"""Compiles every op of our kernels, forward and backward, at aligned, ragged and one-row lengths.

    python -m tests.gpu_fake.kernel_cases [OP ...] [--json FILE]

The ops are those of `benchmarks/kernels`, at the shapes of its parity check and its timings on a GPU. Exits 1 if
one of them fails.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tests.gpu_fake.simulator import device, launches

LENGTHS = (1, 8, 37, 4096)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_fake.kernel_cases", description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", help="all by default")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    device.simulate()
    rows = [row for op in options.ops or all_ops() for row in run(op)]
    failed = [row for row in rows if row["error"]]
    for row in failed:
        print(f"{row['op']} {row['case']} T={row['tokens']}: {row['error']}")
    seconds = sum(compiled.seconds for compiled in launches.COMPILED.values())
    print(f"{len(rows)} cases, {len(failed)} failed; {len(launches.COMPILED)} kernels compiled in {seconds:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(rows), encoding="utf-8")
    return 1 if failed else 0


def all_ops() -> tuple[str, ...]:
    from benchmarks.kernels.cases import OPS

    return OPS


def run(op: str) -> list[dict[str, Any]]:
    """One row per case and length; `error` is empty if everything compiled."""
    import triton

    from benchmarks.kernels import cases, parity

    # the values do not matter, and drawing billions of them would take long
    cases._normal = _empty
    models = [cases.SMOLLM2, cases.SMOLLM2._replace(gelu=True), parity.RAGGED, cases.LLAMA3, cases.QWEN3, cases.GEMMA3]
    rows = []
    for model in models:
        with device.fake_tensors():  # an FP8 product is tried on the chip
            makes = cases.cases_of(model, max(LENGTHS)).get(op, ())
        for make in makes:
            for tokens in LENGTHS:
                case = make()
                rows.append({"op": op, "case": case.label, "tokens": tokens, "error": _error(case, tokens)})
                rows[-1]["triton"] = triton.__version__
    return rows


def _empty(*shape: int, dtype: Any, device: str, std: float = 1.0, grad: bool = True) -> Any:
    import torch

    return torch.empty(shape, dtype=dtype, device=device).requires_grad_(grad)


def _error(case: Any, tokens: int) -> str:
    """The error of the case's forward and backward pass; empty on success."""
    import torch

    from tests.gpu_fake.simulator.counting import Count

    # real and on the host, but with the layout for a device other than "cpu"
    inputs = {} if case.views else case.make(tokens, torch.bfloat16, "cpu:0")
    try:
        with device.fake_tensors(), Count():
            given = {name: _moved(value) for name, value in inputs.items()}
            given = given or case.make(tokens, torch.bfloat16, "cuda")
            outputs = case.ours(**given)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            leaves = [value for value in given.values() if isinstance(value, torch.Tensor) and value.requires_grad]
            if leaves:
                torch.autograd.grad(outputs, leaves, [torch.empty_like(output) for output in outputs])
    except Exception as problem:  # any compiler error
        return f"{type(problem).__name__}: {str(problem).strip().splitlines()[-1][:300]}"
    return ""


def _moved(value: Any) -> Any:
    """The same tensor on the device; a leaf stays a leaf."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.detach().to("cuda").requires_grad_(value.requires_grad)
    if hasattr(value, "to"):
        return value.to("cuda")
    if isinstance(value, tuple):
        return type(value)(*map(_moved, value)) if hasattr(value, "_fields") else value
    return value


if __name__ == "__main__":
    sys.exit(main())
