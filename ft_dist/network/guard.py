"""gloo's ports, which know no secret: only sockets of the run's ranks get through.

gloo connects a pair of ranks with whoever first sends the number that it expects, which is easy to guess, and keeps
every other connection open. So before a rank publishes gloo's address, it attaches a filter to the listener that drops
all data, and that new connections inherit. Each rank posts its sockets to the run's store, and the listeners let these
through; TCP repeats what was dropped after 0.2 s. Once all ranks are connected, a listener drops everything.

The filters are classic BPF: they need Linux, but no privilege.
"""

import contextlib
import ctypes
import os
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

from ft_dist.network.store import RunStore

GROUP_KEY = re.compile(r"(.*//cpu//\d+)/(\d+)")
"""Where a rank of a group publishes gloo's address"""
LOOK_S = 0.01
RANKS_PER_LOOK = 16
"""With more ranks, each looks less often, since one store serves them all"""
WARN_S = 30.0
LISTENING, TIME_WAIT, SYN_RECEIVED = "0A", "06", ("03", "0C")
"""States in /proc/net/tcp"""

SO_ATTACH_FILTER, SO_DETACH_FILTER = 26, 27
DROP_DATA = (
    (0x30, 0, 0, 12),  # A = the byte of the TCP header whose upper half is its length in words
    (0x54, 0, 0, 0xF0),
    (0x74, 0, 0, 2),
    (0x07, 0, 0, 0),  # X = A, the length in bytes
    (0x80, 0, 0, 0),  # A = the length of the packet
    (0x1D, 0, 1, 0),  # equal: nothing but the header
    (0x06, 0, 0, 0xFFFFFFFF),
    (0x06, 0, 0, 0),
)
DROP_ALL = ((0x06, 0, 0, 0),)

Address = tuple[str, int]


class RankInfo(NamedTuple):
    """What a rank publishes for a group."""

    address: Address
    size: int


class GuardedStore(RunStore):
    """A store that guards the port of each gloo group that is formed over it."""

    unguarded = "gloo has published no address"
    """Why a port of gloo is open to strangers, if one is"""
    _posts: RunStore | None = None

    def set(self, key: str, value: bytes | str) -> None:
        """Raises DistNetworkError if somebody connected to gloo before its port was guarded."""
        if match := GROUP_KEY.fullmatch(key):
            try:
                self._guard(match[1], int(match[2]), rank_info(value if isinstance(value, bytes) else value.encode()))
            except (OSError, ValueError) as error:
                self.unguarded = str(error)
        super().set(key, value)

    def _guard(self, group: str, rank: int, info: RankInfo) -> None:
        """Raises OSError or ValueError if this system, or this version of gloo, is not what we expect."""
        listener = _listener(info.address)
        attach(listener, DROP_DATA)
        if _connected(info.address):
            listener.close()
            host, port = info.address
            raise dist.DistNetworkError(f"somebody connected to {host}:{port} before that port was guarded")
        if not self._posts:
            self._posts, self.unguarded = self.clone(), ""
        threading.Thread(
            target=_admit, args=(self._posts, group, rank, info, listener, self.timeout), name="guard", daemon=True
        ).start()


def _admit(store: RunStore, group: str, rank: int, info: RankInfo, listener: socket.socket, timeout: timedelta) -> None:
    """Let the peers in and close the listener to everybody else, or leave the filter as it is after `timeout`."""
    deadline, look_s = time.monotonic() + timeout.total_seconds(), LOOK_S * max(1, info.size / RANKS_PER_LOOK)
    others = [peer for peer in range(info.size) if peer != rank]
    called: dict[Address, int] = {}
    admitted: dict[Address, int] = {}
    """Sockets that this rank has connected to its peers, and theirs that it has let in"""
    warn_at = time.monotonic() + WARN_S
    with listener, contextlib.suppress(dist.DistError):
        # not `get`: its wait would hold up the ranks that form another group over the same connection
        while others and not store.check([f"{group}/{peer}" for peer in others]):
            if time.monotonic() > deadline:
                return
            time.sleep(look_s)
        peers = {rank_info(store.get(f"{group}/{peer}")).address: peer for peer in others}
        while missing := set(others) - {*called.values(), *admitted.values()}:
            now = time.monotonic()
            if now > deadline:
                return
            if now > warn_at:
                print(_warning(rank, missing), file=sys.stderr, flush=True)
                warn_at = deadline
            waiting = []
            for local, remote, connection in _connections():
                if remote in peers and local not in called:
                    store.append(f"ft_dist/guard/{group}/{peers[remote]}", f"{rank} {local[0]} {local[1]}\n")
                    called[local] = peers[remote]
                elif local == info.address and remote not in admitted:
                    waiting.append((remote, _copy(connection)))
            posted = _posted(store, f"ft_dist/guard/{group}/{rank}") if waiting else {}
            for remote, connection in waiting:
                with connection:
                    if remote in posted:
                        connection.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)
                        admitted[remote] = posted[remote]
            time.sleep(look_s)
        attach(listener, DROP_ALL)
        for local, remote, connection in _connections():
            if local == info.address and remote not in admitted:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


def _warning(rank: int, missing: set[int]) -> str:
    return (
        f"rank {rank} has waited {WARN_S:.0f} s for gloo's connections to ranks {sorted(missing)}. Addresses must not "
        "be translated between the nodes: a connection from an address that no rank has is not let in."
    )


def _posted(store: RunStore, key: str) -> dict[Address, int]:
    """Sockets that ranks have connected to this one, with those ranks."""
    if not store.check([key]):
        return {}
    lines = store.get(key).decode().splitlines()
    return {(host, int(port)): int(peer) for peer, host, port in (line.split() for line in lines)}


def rank_info(value: bytes) -> RankInfo:
    """From gloo's bytes: host name, address (a sockaddr_storage and 8 bytes), and 8 bytes for each rank of the group.

    The first two follow their lengths. Raises ValueError.
    """
    try:
        (name_bytes,) = struct.unpack_from("=Q", value)
        (address_bytes,) = struct.unpack_from("=Q", value, 8 + name_bytes)
        at = 16 + name_bytes
        size, rest = divmod(len(value) - at - address_bytes, 8)
        family, port = struct.unpack_from("=H", value, at)[0], struct.unpack_from(">H", value, at + 2)[0]
        start, length = {socket.AF_INET: (4, 4), socket.AF_INET6: (8, 16)}[family]
        host = socket.inet_ntop(family, value[at + start : at + start + length])
    except (struct.error, KeyError, ValueError):
        raise ValueError("gloo publishes its address in a form that we do not know") from None
    if rest or size < 1:
        raise ValueError("gloo publishes its ranks in a form that we do not know")
    return RankInfo((host, port), size)


def attach(connection: socket.socket, program: tuple[tuple[int, int, int, int], ...]) -> None:
    """Filter what arrives at a socket, and at those that it will accept. Raises OSError."""
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *instruction) for instruction in program))
    connection.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("@HP", len(program), ctypes.addressof(code)))


def _listener(address: Address) -> socket.socket:
    """Raises OSError if no socket of this process listens there."""
    for own in _own_sockets():
        if own.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) and _plain(own.getsockname()) == address:
            return _copy(own)
    raise OSError(f"gloo does not listen at {address[0]}:{address[1]}, as it says")


def _connections() -> Iterator[tuple[Address, Address, socket.socket]]:
    """Local and remote address of every connection of this process, with a copy that is closed afterwards."""
    for own in _own_sockets():
        with contextlib.suppress(OSError):
            yield _plain(own.getsockname()), _plain(own.getpeername()), own


def _own_sockets() -> Iterator[socket.socket]:
    """Copies of this process's TCP sockets, each of them closed afterwards."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as own:
                if own.family in (socket.AF_INET, socket.AF_INET6) and own.type == socket.SOCK_STREAM:
                    yield own


def _copy(own: socket.socket) -> socket.socket:
    """`dup()` would make gloo's socket block."""
    return socket.socket(fileno=os.dup(own.fileno()))


def _plain(name: tuple[str, int]) -> Address:
    """Without the scope of an IPv6 address."""
    return name[0].partition("%")[0], name[1]


def _connected(address: Address) -> bool:
    """Whether anybody is connected to an address of this machine, accepted or not."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    words = struct.iter_unpack("=I", socket.inet_pton(family, address[0]))
    wanted = "".join(f"{word:08X}" for (word,) in words) + f":{address[1]:04X}"
    with open("/proc/self/net/tcp6" if family == socket.AF_INET6 else "/proc/self/net/tcp") as table:
        states = [fields[3] for fields in map(str.split, table) if fields[1] == wanted]
    return any(state not in (LISTENING, TIME_WAIT, *SYN_RECEIVED) for state in states)
