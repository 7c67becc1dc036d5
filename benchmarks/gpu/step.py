"""LoRA steps of the product's engine in this process, then a profile by kernel: where the time of a step goes.

    python -m benchmarks.gpu.step MODEL [--steps 5] [--profiled 2] [key.sub=value ...]

Every step is a row. The profile is a row with the 40 slowest kernels and the host's launches and waits, plus a
table in `profile.txt` and a trace in `profile-trace.json.gz` next to the results.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.rows import emit, guarded

TOP = 40
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")


def main() -> int:
    options, overrides = parse()
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    begun = time.perf_counter()
    import torch

    from ft_dist.bench.rank import prepare
    from ft_dist.bench.spec import make_spec
    from ft_dist.model.quiet import quiet_process
    from ft_dist.preemption.stop import StopRequest
    from ft_dist.train import take_step

    quiet_process()
    folder = Path(tempfile.mkdtemp(prefix="ft_dist-step-"))
    spec = make_spec(
        options.model,
        [f"batch.micro_rows={options.rows}", *overrides],
        data="synthetic",
        method=options.method,
        length=options.length,
        rows=options.rows,
        lengths=options.lengths,
        labelled=1.0,
        steps=options.steps,
        checkpoint=False,
        folder=folder,
    )
    stop = StopRequest()
    imported_s = time.perf_counter() - begun
    run = prepare(spec, spec.config(), stop, lambda: None)
    emit("step start", imported_s=imported_s, ready_s=time.perf_counter() - begun)
    on_gpu = run.world.device.type == "cuda"
    failed = 0
    try:
        batches = run.batches()
        for batch in batches:
            started = time.perf_counter()
            take_step(run, stop, batch)
            if on_gpu:
                torch.cuda.synchronize()
            report_step(run, batch, time.perf_counter() - started)
            if run.step == options.steps:
                break
        with guarded("profile") as problems:
            profile([next(batches) for _ in range(options.profiled)], lambda batch: take_step(run, stop, batch), on_gpu)
        failed = len(problems)
    finally:
        run.close()
    return 1 if failed else 0


def report_step(run: Any, batch: Any, seconds: float) -> None:
    """`recorded` is the run's own record of its last step so far."""
    lines = (run.config.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    recorded = json.loads(lines[-1]) if lines else None
    rate = batch.batch.real_tokens / seconds
    print(emit("step", step=run.step, seconds=seconds, tokens_per_s=rate, recorded=recorded), flush=True)


def profile(batches: list[Any], take: Any, on_gpu: bool) -> None:
    """A row and a table of kernels (operations on CPU). Only the device is profiled, so the host is not slowed down."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with torch_profile(activities=[activity]) as profiler:
        started = time.perf_counter()
        for batch in batches:
            take(batch)
        if on_gpu:
            import torch

            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    found = by_name(profiler.profiler.kineto_results.events(), on_gpu)
    kernels, calls = found["kernels"], found["calls"]
    busy_s = sum(row[0] for row in kernels.values())
    top = sorted(kernels.items(), key=lambda item: -item[1][0])[:TOP]
    steps = len(batches)
    emit(
        "profile",
        steps=steps,
        seconds_a_step=seconds / steps,
        device_s_a_step=busy_s / steps,
        device_events_a_step=sum(row[1] for row in kernels.values()) / steps,
        launches_a_step=sum(calls[name] for name in LAUNCHES) / steps,
        waits_a_step={name: calls[name] / steps for name in WAITS if calls[name]},
        kernels=[{"name": name, "ms_a_step": 1e3 * s / steps, "calls_a_step": n / steps} for name, (s, n) in top],
    )
    lines = [f"{steps} steps, {seconds / steps:.4f} s each, {busy_s / steps:.4f} s of it on the device"]
    lines += [f"{1e3 * s / steps:10.3f} ms {s / busy_s:7.1%} {n / steps:8.1f} x  {name[:150]}" for name, (s, n) in top]
    print("\n".join(lines), flush=True)
    out = Path(os.environ.get("FT_DIST_OUT", "."))
    (out / "profile.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    profiler.export_chrome_trace(str(out / "profile-trace.json.gz"))


def by_name(events: Any, on_gpu: bool) -> dict[str, Any]:
    """Seconds and calls of everything that ran on the device, and how often the host called the driver."""
    kernels: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    calls: defaultdict[str, int] = defaultdict(int)
    for event in events:
        if event.is_user_annotation():
            continue
        if on_gpu and str(event.device_type()).endswith("CPU"):
            calls[event.name()] += 1
        else:
            taken = kernels[event.name()]
            taken[0] += event.duration_ns() / 1e9
            taken[1] += 1
    return {"kernels": kernels, "calls": calls}


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.step")
    parser.add_argument("model")
    parser.add_argument("--method", default="lora", choices=["lora", "full"])
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--lengths", default="full")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--profiled", type=int, default=2)
    return parser.parse_known_args()


if __name__ == "__main__":
    sys.exit(main())
