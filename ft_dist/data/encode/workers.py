"""Run a function over a stream of jobs in several processes; results keep the order of the jobs.

Jobs are assigned round-robin, at most AHEAD per worker, so memory is bounded and no queue needs sorting. Workers are
spawned: a fork would copy locks of tokenizers' and torch's threads in an arbitrary state. Each worker runs one thread
and exits when its parent is gone.
"""

import multiprocessing
import os
import queue
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from ft_dist.errors import UserError

AHEAD = 3
"""Jobs queued per worker, so that it never idles while the parent reads or writes"""

MAX_WORKERS = 32
"""One parent can read, check and write for about this many"""


def available_cores() -> int:
    """Number of cores that this process may use, at most MAX_WORKERS."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MAX_WORKERS)


def ordered_map(function: Callable[..., Any], jobs: Iterator[tuple[Any, ...]], *, workers: int) -> Iterator[Any]:
    """Yield `function(*job)` for each job, in order; `function` is sent to every worker once.

    Raises the error of the first job that failed: a UserError unchanged, anything else as RuntimeError with the
    worker's traceback. Closing the iterator stops the workers.
    """
    context = multiprocessing.get_context("spawn")
    pipes: list[Connection] = []
    processes = []
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs,), name="tokenise")
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        for pipe in pipes:
            _send(pipe, function)
        yield from _deal(jobs, pipes)
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.kill()
            process.join()


def _deal(jobs: Iterator[tuple[Any, ...]], pipes: list[Connection]) -> Iterator[Any]:
    waiting: deque[Connection] = deque()
    for turn, job in enumerate(jobs):
        if len(waiting) == AHEAD * len(pipes):
            yield _receive(waiting.popleft())
        pipe = pipes[turn % len(pipes)]
        _send(pipe, job)
        waiting.append(pipe)
    while waiting:
        yield _receive(waiting.popleft())


def _send(pipe: Connection, what: Any) -> None:
    try:
        pipe.send(what)
    except OSError:
        raise _died() from None


def _receive(pipe: Connection) -> Any:
    try:
        result, error = pipe.recv()
    except (EOFError, OSError):
        raise _died() from None
    if isinstance(error, UserError):
        raise error
    if error is not None:
        raise RuntimeError(f"a tokenising process failed:\n{error}")
    return result


def _died() -> RuntimeError:
    return RuntimeError(
        "a tokenising process died, probably out of memory. Run ft-dist prepare with fewer --workers: it resumes "
        "where it stopped."
    )


def _work(pipe: Connection) -> None:
    # a signal that stops a job reaches its whole process group; the parent decides when the workers stop
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # read when the tokenizer is first used: one thread per process, not one per core
    os.environ.update({"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"})
    try:
        function = pipe.recv()
    except (EOFError, OSError):  # the parent is gone
        return
    jobs: queue.Queue[tuple[Any, ...] | None] = queue.Queue()
    # parent and worker write at the same time: an undrained pipe would block both forever
    threading.Thread(target=_listen, args=(pipe, jobs), daemon=True).start()
    while (job := jobs.get()) is not None:
        answer: tuple[Any, UserError | str | None]
        try:
            answer = (function(*job), None)
        except UserError as error:
            answer = (None, error)
        except Exception:
            answer = (None, traceback.format_exc())
        try:
            pipe.send(answer)
        except OSError:  # the parent is gone
            return


def _listen(pipe: Connection, jobs: "queue.Queue[tuple[Any, ...] | None]") -> None:
    try:
        while True:
            jobs.put(pipe.recv())
    except (EOFError, OSError):
        jobs.put(None)
