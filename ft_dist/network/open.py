"""The key-value store through which the ranks of a run find each other, opened as their environment describes it."""

import contextlib
import errno
import os
import resource
import socket
from datetime import timedelta

import torch.distributed as dist

from ft_dist.errors import TrainingError
from ft_dist.network.gate import listen_at
from ft_dist.network.guard import GuardedStore
from ft_dist.network.secret import secret_of
from ft_dist.network.store import StoreServer


def several_nodes() -> bool:
    """True if the launcher started several nodes; torchrun and our launcher set the same variable."""
    return int(os.environ.get("GROUP_WORLD_SIZE", os.environ.get("SLURM_NNODES", "1"))) > 1


def open_store(*, timeout_s: float) -> dist.Store:
    """The ranks' shared key-value store, available before they form a process group.

    Ranks that know the secret of their run share a store that nobody else can use. Without one (torchrun, or ranks
    started by hand, without FT_DIST_SECRET) it is torch's own, which has no protection beyond the address at which it
    listens. Raises TrainingError if the port of rank 0 is in use: the next start gets another port.
    """
    _allow_open_files()
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if "MASTER_PORT" not in os.environ or size == 1:
        # a world of one needs no port
        return dist.HashStore()
    secret = secret_of(os.environ)
    address, port = os.environ.setdefault("MASTER_ADDR", "127.0.0.1"), int(os.environ["MASTER_PORT"])
    timeout = timedelta(seconds=timeout_s)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        hosted = dist.TCPStore(address, port, size, is_master=False, timeout=timeout, wait_for_workers=False)
        # the agent's store outlives a restart, whose ranks must not find the answers of the ranks before them
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", hosted)
        if not secret:
            return store
        # its port is taken, so rank 0 serves ours at another; a forged address has no secret
        if rank == 0:
            server = StoreServer(_listen(address, 0), secret)
            store.set("ft_dist/store", str(server.port))
        return GuardedStore(address, int(store.get("ft_dist/store")), secret, timeout=timeout)
    listener = _listen(address, port) if rank == 0 else None
    if secret:
        if listener:
            StoreServer(listener, secret)
        return GuardedStore(address, port, secret, timeout=timeout)
    return dist.TCPStore(
        address,
        port,
        size,
        is_master=rank == 0,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach() if listener else None,
    )


def _listen(address: str, port: int) -> socket.socket:
    """Raises TrainingError if the port is in use."""
    try:
        return listen_at(address, port, several_nodes=several_nodes())
    except socket.gaierror as error:
        raise TrainingError(
            f"{socket.gethostname()}: MASTER_ADDR={address} is no address ({error.strerror}). Set another MASTER_ADDR."
        ) from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise TrainingError(
                f"{socket.gethostname()}: MASTER_PORT={port} is in use by another program. Set another MASTER_PORT."
            ) from None
        if error.errno != errno.EADDRNOTAVAIL:
            raise
        if not secret_of(os.environ):
            raise TrainingError(
                f"{socket.gethostname()}: MASTER_ADDR={address} is not an address of this machine. Set one of rank 0, "
                "or FT_DIST_SECRET on every node."
            ) from None
        # an address that is translated on the way to this machine, such as that of a Kubernetes service
        return listen_at("0.0.0.0", port, several_nodes=True)  # noqa: S104 - what connects needs the secret


def _allow_open_files() -> None:
    """As many as the system permits: gloo keeps connections that strangers open while ranks look for each other."""
    with contextlib.suppress(OSError, ValueError):
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
