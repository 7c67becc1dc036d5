"""One rank of the comparison: each contestant saves the same state in turn, for several rounds; rank 0 prints JSON.

`save` measures saving and loading on this world; `load` only loads our commit, on any world size.
"""

import argparse
import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ft_dist.checkpoint.commit import format as layout
from ft_dist.checkpoint.load import load
from ft_dist.config import load_config
from ft_dist.distributed import barrier, max_over_ranks
from ft_dist.engine.fragments import adam_step, owned_tensors
from ft_dist.engine.step import StepResult
from ft_dist.model.quiet import quiet_process
from ft_dist.preemption.stop import StopRequest


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["save", "load"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("rounds", type=int)
    parser.add_argument("config", nargs="+")
    options = parser.parse_args()
    quiet_process()
    from ft_dist.run.start import prepare_run

    run = prepare_run(load_config(options.config[0], options.config[1:]), StopRequest(), free_memory=lambda: None)
    batch = next(run.batches())

    def step() -> StepResult:
        labelled = batch.batch.labelled_tokens
        return run.engine.train_step(batch.micro_batches, weight=labelled, learning_rate=1e-5)

    step()
    side = Side(run, options.folder, step)
    found = side.save_all(options.rounds) if options.what == "save" else {"load_s": side.load(options.rounds)}
    run.close()
    if run.world.is_main:
        print("RESULT " + json.dumps(found), flush=True)


class Side:
    """The contestants over one engine. Times are the slowest rank's; bytes count all files.

    `stall_s` is how long training waits for a save; `cost_s` is how much longer a save and the following step take
    than a step alone, because background work slows that step down.
    """

    def __init__(self, run: Any, folder: Path, step: Callable[[], StepResult]) -> None:
        self.step = step
        self.engine, self.world, self.folder, self.writer = run.engine, run.world, folder, run.checkpoints.writer
        self.places = {
            "ours": folder / "ours" / "checkpoints",
            "deepspeed": folder / "deepspeed",
            "dcp": folder / "dcp",
        }
        self.dcp_group = dist.new_group(backend="gloo")

    def save_all(self, rounds: int) -> dict[str, Any]:
        contestants = {"ours": self.ours, "deepspeed": self.deepspeed, "dcp": self.dcp}
        found: dict[str, Any] = {name: [] for name in contestants}
        for number in range(1, rounds + 1):
            for name, contestant in contestants.items():
                found[name].append(self.measured(name, contestant, number))
        found["load_s"] = {"ours": self.load(rounds), "deepspeed": self.load_deepspeed()}
        return found

    def measured(self, name: str, contestant: Callable[[int], Callable[[], None]], number: int) -> dict[str, float]:
        """`contestant` returns when training may continue; calling its result waits until the files exist."""
        barrier(self.world)
        started = time.perf_counter()
        self.step()
        alone = time.perf_counter() - started
        barrier(self.world)
        with PeakMemory() as memory:
            started = time.perf_counter()
            finish = contestant(number)
            stall = time.perf_counter() - started
            stall += self.step().held_up_s
            cost = time.perf_counter() - started - alone
            finish()
            total = time.perf_counter() - started
        barrier(self.world)
        place = self.places[name]
        size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
        if name == "dcp" and self.world.is_main:
            shutil.rmtree(place, ignore_errors=True)
        taken = {"stall_s": stall, "cost_s": cost, "total_s": total, "extra_bytes": float(memory.extra_bytes)}
        return {name: max_over_ranks(value, self.world) for name, value in taken.items()} | {"bytes": size}

    def ours(self, number: int) -> Callable[[], None]:
        state = {
            "step": number,
            "adam_step": adam_step(self.engine),
            "parameters": self.engine.trainable_shapes(),
            "data": None,
        }
        self.writer.save(owned_tensors(self.engine), step=number, state=state)
        return self.wait_for_ours

    def wait_for_ours(self) -> None:
        self.writer.wait()
        problems = [report.note for report in self.writer.new_events() if report.name == "save_failed"]
        assert not problems, problems

    def deepspeed(self, number: int) -> Callable[[], None]:
        # the same tag each time, so a single checkpoint is overwritten
        self.engine.deepspeed.save_checkpoint(str(self.places["deepspeed"]), tag="step", exclude_frozen_parameters=True)
        return lambda: None

    def dcp(self, number: int) -> Callable[[], None]:
        import torch.distributed.checkpoint as dcp

        future = dcp.async_save(
            owned_tensors(self.engine), checkpoint_id=str(self.places["dcp"]), process_group=self.dcp_group
        )
        return lambda: future.result() and None

    def load(self, rounds: int) -> float:
        commit = layout.commits(self.places["ours"])[-1]
        times = []
        for _ in range(rounds):
            barrier(self.world)
            started = time.perf_counter()
            if self.world.is_main:
                layout.verify(commit)
            barrier(self.world)
            load(self.engine, commit)
            times.append(max_over_ranks(time.perf_counter() - started, self.world))
        return min(times)

    def load_deepspeed(self) -> float:
        barrier(self.world)
        started = time.perf_counter()
        self.engine.deepspeed.load_checkpoint(str(self.places["deepspeed"]), load_module_strict=False)
        return max_over_ranks(time.perf_counter() - started, self.world)


class PeakMemory:
    """Peak anonymous memory (RssAnon, without the page cache) above its value at entry, sampled every 5 ms."""

    def __enter__(self) -> "PeakMemory":
        self._before = self._most = resident_bytes()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._ended.wait(0.005):
            self._most = max(self._most, resident_bytes())

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()
        self.extra_bytes = max(self._most, resident_bytes()) - self._before


def resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this benchmark reads /proc/self/status, so it needs Linux")


if __name__ == "__main__":
    main()
