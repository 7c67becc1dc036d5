"""Compile every kernel that later stages launch, in several processes that share one Triton cache.

Each work item runs for real: a case of the parity check, a case of the ops, or a step of a one-layer model. So the
kernels get the arguments of the later stages, and what is already in the cache costs nothing.
"""

import argparse
import itertools
import os
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# look for GPUs through NVML: a process that has initialised CUDA cannot be forked
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import torch

from benchmarks.kernels.cases import OPS, TINY, cases, cases_of
from benchmarks.kernels.harness import step, upstream_for
from benchmarks.kernels.parity import LENGTHS, MODELS
from benchmarks.rows import emit, tail

Item = tuple[Any, ...]
STEPS = (
    "--model llama3-8b --rows 2 --tokens 4096",
    "--model llama3-8b --rows 2 --tokens 4096 --samples 20",
    "--model llama3.2-3b --rows 2 --tokens 4096 --method full --checkpointing",
)
TINY_STEPS = ("--model tiny --rows 2 --tokens 64",)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.compile")
    parser.add_argument("--tiny", action="store_true", help="small shapes on CPU, to try the command")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 12))
    options = parser.parse_args()
    started, before = time.perf_counter(), kernels_in_cache()
    items = work(tiny=options.tiny)
    failed = 0
    with ProcessPoolExecutor(min(options.jobs, len(items)), mp_context=get_context("fork")) as pool:
        running = {pool.submit(compile_item, item, options.tiny): item for item in items}
        for future in as_completed(running):
            try:
                problem = future.result()
            except Exception as error:  # a process that dies breaks the pool; compiled kernels stay
                problem = f"{type(error).__name__}: {error}"
            if problem:
                failed += 1
                print(running[future], problem, flush=True)
                emit("compile item", item=" ".join(map(str, running[future])), failed=tail(problem))
    after = kernels_in_cache()
    seconds = time.perf_counter() - started
    row = emit("compile", items=len(items), failed=failed, kernels_before=before, kernels_after=after, seconds=seconds)
    print(row, flush=True)
    return 1 if failed else 0


def work(*, tiny: bool) -> list[Item]:
    """Largest first. Only names: this process builds no case and never touches the device, otherwise its children could
    not use it."""
    steps: list[Item] = [("step", arguments) for arguments in (TINY_STEPS if tiny else STEPS)]
    ops: list[Item] = [("op", op) for op in OPS]
    models = (TINY,) if tiny else MODELS
    return steps + ops + [("parity", *one) for one in itertools.product(models, OPS, LENGTHS)]


def kernels_in_cache() -> int:
    folder = Path(os.environ.get("TRITON_CACHE_DIR", Path.home() / ".triton" / "cache"))
    return sum(1 for ending in ("cubin", "hsaco") for _ in folder.glob(f"*/*.{ending}"))


def compile_item(item: Item, tiny: bool) -> str | None:
    """None, or the traceback of the failure. Runs in its own process and builds its cases there, since building
    one can touch the device."""
    device = "cpu" if tiny else "cuda"
    kind, *what = item
    try:
        torch.set_num_threads(1)
        if kind == "step":
            one_layer(what[0], device)
        elif kind == "op":
            for case in cases(device, (what[0],), quick=True, tiny=tiny):
                run_case(case, case.tokens, device)
        else:
            model, op, tokens = what
            for make in cases_of(model, max(LENGTHS)).get(op, ()):
                run_case(make(), tokens, device)
        if device == "cuda":
            torch.cuda.synchronize()
    except Exception as error:
        return "".join(traceback.format_exception(error))
    finally:
        if device == "cuda":
            torch.cuda.empty_cache()
    return None


def run_case(case: Any, tokens: int, device: str) -> None:
    inputs = case.make(tokens, torch.bfloat16, device)
    step(case.ours, inputs, upstream_for(case.ours, inputs))


def one_layer(arguments: str, device: str) -> None:
    """Our forward and backward passes at the model's widths, with one layer."""
    from benchmarks.training import side

    options = side.parse(
        ["ours", *arguments.split(), "--dtype", "bf16" if device == "cuda" else "fp32", "--device", device]
    )
    model = side.with_adapters(side.plain_model(options, layers=1), options)
    forward = side.our_forward(model, options)
    forward(side.rows(options)).backward()


if __name__ == "__main__":
    sys.exit(main())
