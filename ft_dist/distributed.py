"""The rank of this process and the few collectives that the training loop needs.

The world comes from the environment that torchrun, our launcher or SLURM sets (RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR, MASTER_PORT); without it the world size is 1.
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ft_dist.errors import TrainingError, UserError, first_line
from ft_dist.network.guard import GuardedStore

GLOO_IDLE_S = 5.0
LONGEST_READ_S = 30.0


@dataclass(frozen=True)
class World:
    """Rank, size and device of this process.

    `rank` and `size` count processes. `data_rank` and `data_size` count shares of the global batch; they are equal to
    `rank` and `size` as long as each process trains on a different share.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def data_rank(self) -> int:
        return self.rank

    @property
    def data_size(self) -> int:
        return self.size

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def join_world(store: dist.Store, *, timeout_s: float) -> World:
    """Initialise the process group: NCCL on GPUs, gloo on CPU. Call `leave_world` at the end."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        _make_gpus_deterministic()
        backend = "cpu:gloo,cuda:nccl"
        # NCCL's monitor would ask the store every second from a thread, which needs the interpreter for our store and
        # might wait for it while this process ends; the dump that it waits for is torch's own, and off
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
    else:
        device = torch.device("cpu")
        backend = "gloo"
        # DeepSpeed would otherwise probe for accelerators and pick one that this torch does not support
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("LOCAL_RANK", str(local_rank))
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    if isinstance(store, GuardedStore) and not store.seen:
        print("gloo's port is open to strangers: its address has another key than we know", file=sys.stderr)
    os.environ.setdefault("MASTER_PORT", "29500")
    return World(rank=rank, size=size, local_rank=local_rank, local_size=local_size, device=device)


def _make_gpus_deterministic() -> None:
    """Disable what makes a resumed run differ from an uninterrupted one, or a sum depend on how it was split.

    cuDNN's attention backward is not deterministic and builds a plan of about a second for every new shape; models that
    do not use our attention would get it by default. cuBLAS accumulates partial products in bf16 by default.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def leave_world() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        _wait_for_gloo()


def _wait_for_gloo() -> None:
    """Wait until gloo's threads are idle, but not longer than GLOO_IDLE_S.

    DeepSpeed's references keep the threads of a destroyed group alive. One that still has to free a tensor needs the
    interpreter; if it asks for it while the interpreter shuts down, the process aborts (SIGABRT) after a finished run.
    """
    deadline, idle = time.monotonic() + GLOO_IDLE_S, 0
    while idle < 2 and time.monotonic() < deadline:
        time.sleep(0.01)  # leaves the interpreter to them
        idle = 0 if _gloo_runs() else idle + 1


def _gloo_runs() -> bool:
    for task in Path("/proc/self/task").glob("*"):
        with contextlib.suppress(OSError):
            name, _, rest = (task / "stat").read_text().partition("(")[2].rpartition(") ")
            if name.startswith("pt_gloo") and not rest.startswith("S"):
                return True
    return False


def sum_over_ranks(values: list[float], world: World) -> list[float]:
    """Sum each number over all ranks, in double precision, between hosts: no GPU is synchronised."""
    if world.size == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor)
    return [float(value) for value in tensor.tolist()]


def reduce_scatter(whole: torch.Tensor, share: torch.Tensor, world: World) -> None:
    """Sum `whole` (1-D) over ranks and store this rank's part in `share`, one of its `world.size` equal parts.

    The other parts are undefined afterwards.
    """
    if world.size > 1:
        # renamed in torch 2.13
        call = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        call(share, whole)


def gather(row: torch.Tensor, world: World) -> torch.Tensor:
    """The rows (N,) of all ranks, as (world.size, N) in rank order, on every rank."""
    if world.size == 1:
        return row[None]
    rows = row.new_empty(world.size * row.numel())
    call = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    call(rows, row)
    return rows.view(world.size, -1)


def max_over_ranks(value: float, world: World) -> float:
    if world.size == 1:
        return value
    tensor = torch.tensor([value], dtype=torch.float64, device=world.device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor.item())


STOP_KEY = "ft_dist/stop"


def announce_stop() -> None:
    """Notify ranks that wait for data, where no reduction reaches them, that this rank was asked to stop."""
    control_store().set(STOP_KEY, "1")


def stop_announced() -> bool:
    """True if any rank has called `announce_stop`."""
    return bool(control_store().check([STOP_KEY]))


FAULT_KEY = "ft_dist/fault"


def announce_fault(text: str) -> None:
    """Say why this rank cannot take the step that all ranks are about to abandon."""
    control_store().compare_set(FAULT_KEY, "", text)


def announced_fault(world: World) -> str | None:
    """What a rank has announced, if any has. All ranks call it, after a step that they have abandoned together."""
    store = control_store()
    if not store.check([FAULT_KEY]):
        return None
    text = store.get(FAULT_KEY).decode()
    store.add(f"{FAULT_KEY}/known", 1)
    if world.is_main:
        await_count(store, f"{FAULT_KEY}/known", world.size)
    return text


_connections: list[tuple[threading.Thread, dist.Store, dist.Store]] = []
"""Each with the thread that uses it and the default store that it is a copy of"""
_connections_lock = threading.Lock()


def control_store() -> dist.Store:
    """The ranks' shared key-value store over a connection of this thread, which may use it during collectives.

    A thread that has ended leaves its connection to the next one: new ones cost time when strangers are at the port.
    """
    default, thread = dist.distributed_c10d._get_default_store(), threading.current_thread()
    with _connections_lock:
        _connections[:] = [entry for entry in _connections if entry[2] is default]
        free = None
        for at, (user, store, _) in enumerate(_connections):
            if user is thread:
                return store
            if not user.is_alive():
                free = at
        if free is not None:
            _connections[free] = (thread, _connections[free][1], default)
            return _connections[free][1]
    store = default.clone()
    with _connections_lock:
        _connections.append((thread, store, default))
    return store


def decided(world: World, key: str, decide: Callable[[], Any], *, timeout_s: float, together: bool = False) -> Any:
    """What `decide` returns on rank 0, as JSON holds it, on every rank. All ranks call it, once per `key`.

    `together`: the others run `decide` too, because it holds collectives, and drop what it returns. If it raises
    anything on a rank that runs it, all ranks raise: that one its own error, the others a UserError or TrainingError
    with its text. A rank alone in a collective may first notice after the timeout of the process group.
    """
    error: Exception | None = None
    try:
        store = dist.PrefixStore(key, control_store())
        if world.is_main or together:
            try:
                mine = {"result": decide()}
            except Exception as caught:  # any: the others wait for it
                error, mine = caught, _error_answer(caught, world.rank)
            if world.is_main or error:
                store.compare_set("answer", "", json.dumps(mine))  # the first error is the cause of the others
        if not world.is_main:
            store.wait(["answer"], timedelta(seconds=timeout_s))
        answer = json.loads(store.get("answer"))
        if "error" in answer:
            store.add("known", 1)
            if world.is_main:
                await_count(store, "known", world.size)
    except dist.DistError as lost:
        raise TrainingError(
            f"rank {world.rank}: rank 0 did not say within {timeout_s:g} s what it found ({key}: {first_line(lost)}). "
            "Its log says why."
        ) from (error or lost)
    if "error" in answer and (error is None or answer["rank"] != world.rank):
        raise (UserError if answer["fixable"] else TrainingError)(answer["error"]) from error
    if error:
        raise error
    return answer["result"]


def _error_answer(error: Exception, rank: int) -> dict[str, Any]:
    fixable = isinstance(error, UserError)
    plain = fixable or isinstance(error, TrainingError)
    text = str(error) if plain else f"rank {rank}: {type(error).__name__}: {first_line(error)}. Its log says where."
    return {"error": text, "fixable": fixable, "rank": rank}


def fault_of_machine(error: BaseException) -> str | None:
    """One line if the cause is another rank that is gone or a GPU that failed, not the code that raised `error`."""
    if is_lost_peer(error):
        return f"another rank is gone or does not answer ({first_line(error)})"
    if isinstance(error, RuntimeError) and "CUDA error" in str(error):
        return f"the GPU failed ({first_line(error)})"
    return None


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank has left or is late; gloo raises a plain RuntimeError."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


def await_count(store: dist.Store, key: str, count: int) -> None:
    """Rank 0 may host the store, so it must not leave before the others have read, or LONGEST_READ_S are over."""
    deadline = time.monotonic() + LONGEST_READ_S
    while store.add(key, 0) < count and time.monotonic() < deadline:
        time.sleep(0.005)


class Agreement:
    """Finds whether any rank wants something; all ranks get the answer in the same call.

    Every rank must call `ask` equally often. The all-reduce of a call runs while the caller computes, and the next call
    reads its result, so no rank waits; `settle` reads the last result.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._pending: tuple[Any, torch.Tensor] | None = None

    def ask(self, wanted: bool) -> bool:
        """Submit this rank's wish; returns whether any rank wanted it up to the previous call."""
        if self._world.size == 1:
            return wanted
        before = self.settle()
        # on the host, through gloo: reading it does not synchronise a GPU
        flag = torch.tensor([float(wanted or before)])
        self._pending = dist.all_reduce(flag, op=dist.ReduceOp.MAX, async_op=True), flag
        return before

    def settle(self) -> bool:
        """The result of the last call to `ask`. False if none is pending."""
        if self._pending is None:
            return False
        work, flag = self._pending
        work.wait()
        self._pending = None
        return flag.item() > 0


def barrier(world: World) -> None:
    if world.size > 1:
        max_over_ranks(0.0, world)
