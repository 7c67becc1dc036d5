"""glibc's heap of a rank that trains on CPU: what a step frees stays there, and what the first step needs is there in
time.

Memory that a process uses for the first time is made page by page while it waits. On a virtual machine whose host takes
freed memory back, that took 0.2 to 1.6 s for each GB.
"""

import ctypes
import platform
import threading
from collections.abc import Callable

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h of glibc
_BLOCK = 2**28


def keep_freed_memory() -> None:
    """Let glibc keep the activations that a CPU step frees for the next step.

    By default it gives large blocks, and the top of its heap, back to the kernel at once, so that every step faults the
    same pages in again: a LoRA step of SmolLM2-135M took 10.2 s with it, and 10.6 s without. No effect without glibc.
    """
    libc = _glibc()
    if libc:
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)


def touch_ahead(nbytes: int) -> Callable[[], None]:
    """Have a thread use `nbytes` of the heap, beside whatever this one does next.

    The result ends that, after the block it is at, and frees them all, to be allocated again. Call `keep_freed_memory`
    first: otherwise glibc gives them back. No effect without glibc.
    """
    libc = _glibc()
    if libc is None or nbytes <= 0:
        return lambda: None
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    blocks = [libc.malloc(min(_BLOCK, nbytes - begin)) for begin in range(0, nbytes, _BLOCK)]
    enough = threading.Event()

    def touch() -> None:
        for number, block in enumerate(blocks):
            if block and not enough.is_set():
                ctypes.memset(block, 0, min(_BLOCK, nbytes - number * _BLOCK))

    thread = threading.Thread(target=touch, name="touch-ahead", daemon=True)
    thread.start()

    def free() -> None:
        enough.set()
        thread.join()
        for block in blocks:
            libc.free(block)

    return free


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
