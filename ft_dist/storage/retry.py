"""Which errors of an object store or a file system are retried, and after what delay.

Transient errors (timeouts, 408, 425, 429, 5xx, refused or broken connections, partial bodies) are retried with
exponential back-off and jitter (Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog 2015). Permanent
errors (missing, forbidden, invalid request) are not.
"""

import errno
import random
import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

LOCAL_WAIT_S = 60.0
"""How long a file server may take to answer again: a failover of NFS takes less"""
FIRST_DELAY_S, LONGEST_DELAY_S = 0.5, 15.0

_STATUS_NAMES = ("status", "status_code", "code")
_PERMANENT_ERRNO = {
    errno.EINVAL, errno.EPERM, errno.EACCES, errno.ENOENT, errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENOSPC,
    errno.EROFS, errno.ENOSYS, errno.ENAMETOOLONG, errno.EMSGSIZE, errno.ENOTEMPTY, errno.EDQUOT,
}  # fmt: skip
_PERMANENT_NAMES = ("Credentials", "ParamValidation", "Authentication", "InvalidURL", "NotFound", "UnknownService")
_REMOTE_LIBRARIES = {"aiohttp", "aiobotocore", "botocore", "azure", "gcsfs", "google", "httpx", "huggingface_hub"}
_REMOTE_LIBRARIES |= {"fsspec", "requests", "s3fs", "urllib3"}


def is_transient(error: Exception) -> bool:
    """True if a retry may succeed. Decided by HTTP status, else by error name, errno and the library that raised it."""
    response = getattr(error, "response", None)
    for status in (getattr(holder, name, None) for holder in (error, response) for name in _STATUS_NAMES):
        if isinstance(status, int | str) and str(status).isdigit() and 400 <= int(status) < 600:
            return int(status) in (408, 425, 429) or int(status) >= 500
    if any(name in type(error).__name__ for name in _PERMANENT_NAMES):
        return False
    if isinstance(error, OSError):
        return error.errno not in _PERMANENT_ERRNO and not isinstance(error, FileNotFoundError | PermissionError)
    library = type(error).__module__.partition(".")[0]
    return isinstance(error, EOFError) or library in _REMOTE_LIBRARIES or "Timeout" in type(error).__name__


def delay_s(attempts: int, generator: random.Random) -> float:
    """Seconds to wait after this many failed attempts: between a tenth of the back-off limit and the limit."""
    limit = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0 ** min(attempts - 1, 10))
    return generator.uniform(limit / 10, limit)


def patiently(call: Callable[[], Result], *, wait_s: float | None = None) -> Result:
    """What `call` returns; retries its transient OSErrors (EIO, ESTALE, ...) for `wait_s` (default LOCAL_WAIT_S)."""
    deadline, attempts = time.monotonic() + (LOCAL_WAIT_S if wait_s is None else wait_s), 0
    generator = random.Random()  # noqa: S311 - spreads retries, guards nothing
    while True:
        attempts += 1
        try:
            return call()
        except OSError as error:
            if not is_transient(error) or time.monotonic() >= deadline:
                raise
            time.sleep(min(delay_s(attempts, generator), max(0.0, deadline - time.monotonic())))
