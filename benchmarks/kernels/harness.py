"""Times, errors and peak memory of one op: ours against eager and any peers, paired in one run.

Error: the largest, over outputs and gradients, of ||a - truth|| / ||truth||, truth in fp64 on the same rounded inputs.
A gradient that vanishes (say of a query that sees only one key) is compared with its natural scale instead.
Time: forward and backward, contestants in turn; medians. Memory: the peak above the size of the inputs.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]


@dataclass
class Case:
    """An op at one shape. `make(tokens, dtype, device)` gives inputs; tensors that require a gradient are leaves.

    `ours`, `eager` and `peers` take the inputs and return one tensor or a tuple. `cost(tokens)` is (bytes, FLOPs) of a
    forward and backward pass, as in `formula`. `floor` is the work that no implementation can avoid, where that is a
    useful reference (the frozen products of a LoRA layer). `truth` (for fp64) and `yardstick` replace `eager` in errors
    where its own random numbers make it useless (dropout). `views`: inputs share memory, so none can be
    replaced by a copy.
    """

    op: str
    label: str
    tokens: int
    make: Callable[[int, torch.dtype, str], Inputs]
    ours: Callable[..., Any]
    eager: Callable[..., Any]
    cost: Callable[[int], tuple[float, float]]
    formula: str
    error_tokens: int = 256
    peers: dict[str, Callable[..., Any]] = field(default_factory=dict)
    floor: Callable[..., Any] | None = None
    truth: Callable[..., Any] | None = None
    yardstick: Callable[..., Any] | None = None
    views: bool = False


def outputs_of(function: Callable[..., Any], inputs: Inputs) -> tuple[Tensor, ...]:
    result = function(**inputs)
    return result if isinstance(result, tuple) else (result,)


def step(function: Callable[..., Any], inputs: Inputs, upstream: list[Tensor] | None) -> list[Tensor]:
    """Outputs and gradients of one forward and backward pass."""
    outputs = outputs_of(function, inputs)
    leaves = [value for value in inputs.values() if isinstance(value, Tensor) and value.requires_grad]
    if not leaves:
        return list(outputs)
    seeds = upstream or [torch.ones_like(output) for output in outputs]
    seeds = [seed.to(output.dtype) for seed, output in zip(seeds, outputs, strict=True)]
    return [*(output.detach() for output in outputs), *torch.autograd.grad(outputs, leaves, seeds)]


def upstream_for(function: Callable[..., Any], inputs: Inputs) -> list[Tensor]:
    """A fixed random gradient for every output; 1 for a scalar loss."""
    with torch.no_grad():
        outputs = outputs_of(function, inputs)
    generator = torch.Generator().manual_seed(7)
    return [
        torch.ones_like(o) if o.dim() == 0 else torch.randn(o.shape, generator=generator).to(o.device, o.dtype)
        for o in outputs
    ]


def _in(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The inputs as leaves of another float dtype."""
    return {
        name: value.detach().to(dtype).requires_grad_(value.requires_grad)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in inputs.items()
    }


VANISHED = 1e-4
"""Relative to its natural scale: a gradient this small is a true 0 up to cancellation"""


def _norms(truth: list[Tensor], inputs: Inputs, upstream: list[Tensor]) -> list[float]:
    """The scale of the errors of outputs and gradients: the norm of each true value.

    Where a gradient's norm is under VANISHED of ||upstream|| ||output|| / ||input||, which it has unless terms cancel,
    that scale replaces it: with one token, the true gradient of attention's queries is 0.
    """
    leaves = [value for value in inputs.values() if isinstance(value, Tensor) and value.requires_grad]
    outputs = truth[: len(upstream)]
    reach = sum(float(up.double().norm()) * float(out.norm()) for up, out in zip(upstream, outputs, strict=True))
    norms = [max(float(tensor.norm()), 1e-30) for tensor in truth]
    for index, leaf in enumerate(leaves if len(truth) > len(upstream) else (), start=len(upstream)):
        scale = reach / max(float(leaf.detach().double().norm()), 1e-30)
        if norms[index] < VANISHED * scale:
            norms[index] = scale
    return norms


def errors(case: Case, dtype: torch.dtype, device: str) -> dict[str, float]:
    """Relative error of ours and of eager on a shortened case."""
    inputs = case.make(min(case.tokens, case.error_tokens), dtype, device)
    upstream = upstream_for(case.eager, inputs)
    truth = step(case.truth or case.eager, _in(inputs, torch.float64), [seed.double() for seed in upstream])
    truth = [tensor.double() for tensor in truth]
    norms = _norms(truth, inputs, upstream)
    result = {}
    for name, function in (("ours", case.ours), ("eager", case.yardstick or case.eager)):
        got = step(function, inputs, upstream)
        result[name] = max(float((a.double() - t).norm()) / norm for a, t, norm in zip(got, truth, norms, strict=True))
    return result


def _cpu_peak_bytes(run: Callable[[], Any]) -> int:
    """The highest sum of live allocations during `run`, from the profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def peak_bytes(run: Callable[[], Any], device: str) -> int:
    if device == "cpu":
        return _cpu_peak_bytes(run)
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def medians_s(contestants: dict[str, Callable[[], Any]], device: str, rounds: int) -> dict[str, float]:
    """Seconds per call: the contestants take turns, so machine drift affects all of them."""
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            if device == "cpu":
                begin = time.perf_counter()
                run()
                taken[name].append(time.perf_counter() - begin)
            else:
                from triton.testing import do_bench

                taken[name].append(do_bench(run, warmup=10, rep=60, return_mode="median") / 1e3)
    return {name: statistics.median(values) for name, values in taken.items()}


def ceilings(device: str) -> dict[str, float]:
    """This device's rate on a plain copy (bytes/s) and a large bf16 product (FLOP/s), measured now."""
    if device == "cpu":
        return {}
    from triton.testing import do_bench

    source = torch.empty(1 << 29, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    copy_s = do_bench(lambda: target.copy_(source), return_mode="median") / 1e3
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=device) for _ in range(2))
    product_s = do_bench(lambda: a @ b, return_mode="median") / 1e3
    return {"copy_bytes_per_s": 2 * source.numel() * 2 / copy_s, "bf16_flops": 2 * 8192**3 / product_s}


def measure(case: Case, dtype: torch.dtype, device: str, limits: dict[str, float], *, rounds: int) -> dict[str, Any]:
    """One row of the report."""
    error = errors(case, dtype, device)
    inputs = case.make(case.tokens, dtype, device)
    upstream = upstream_for(case.ours, inputs)

    def runner(function: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: step(function, inputs, upstream)

    contestants = {"ours": runner(case.ours), "eager": runner(case.eager)}
    failed = {}
    for name, peer in case.peers.items():
        try:
            runner(peer)()
            contestants[name] = runner(peer)
        except Exception as problem:  # any version of a peer may fail in any way; the report records it
            failed[name] = f"{type(problem).__name__}: {str(problem)[:120]}"
    if case.floor is not None:
        contestants["floor"] = runner(case.floor)
    for run in contestants.values():
        run()
    seconds = medians_s(contestants, device, rounds)
    memory = {name: peak_bytes(run, device) for name, run in contestants.items() if name != "floor"}
    row = {
        "op": case.op,
        "shape": case.label,
        "dtype": str(dtype).removeprefix("torch."),
        "error": error,
        "seconds": seconds,
        "peak_bytes": memory,
        "time_ratio": seconds["ours"] / seconds["eager"],
        "memory_ratio": memory["ours"] / max(memory["eager"], 1),
        "peers_failed": failed,
    }
    if case.floor is not None:
        row["over_floor"] = seconds["ours"] / seconds["floor"] - 1.0
    if limits:
        moved, flops = case.cost(case.tokens)
        ideal = max(moved / limits["copy_bytes_per_s"], flops / limits["bf16_flops"])
        row |= {"formula": case.formula, "bytes": moved, "flops": flops, "roofline_share": ideal / seconds["ours"]}
    return row
