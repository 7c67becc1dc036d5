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

from ft_dist.errors import first_line
from ft_dist.network.store import RunStore

GROUP_KEY = re.compile(r"(.*//cpu//\d+)/(\d+)")
"""Where a rank of a group publishes gloo's address"""
MOST_RANKS = 64
"""gloo connects one pair after the other, so the delays add up: to seconds with 64 ranks, to minutes with 1000"""
LOOK_S = 0.01
WARN_S = 30.0
LISTENING, TIME_WAIT, SYN_RECEIVED = "0A", "06", ("03", "0C")
"""States in /proc/net/tcp"""

SO_ATTACH_FILTER, SO_DETACH_FILTER = 26, 27
DROP_DATA = (  # but not what opens and closes a connection
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

    def __init__(self, host: str, port: int, secret: str, *, timeout: timedelta) -> None:
        super().__init__(host, port, secret, timeout=timeout)
        self.seen = False
        """Whether a group has published an address under a key that we know"""
        self.guarded = 0
        """Groups whose ports were guarded"""
        self._guards: dict[str, Guard] = {}
        self._posts: RunStore | None = None

    def set(self, key: str, value: bytes | str) -> None:
        """Raises DistNetworkError if somebody connected to gloo before its port was guarded."""
        if match := GROUP_KEY.fullmatch(key):
            self.seen = True
            try:
                self._guard(match[1], int(match[2]), rank_info(value if isinstance(value, bytes) else value.encode()))
            except (OSError, ValueError) as error:
                _say(f"gloo's port is open to strangers: {error}")
        super().set(key, value)

    def get(self, key: str) -> bytes:
        value = super().get(key)
        if (match := GROUP_KEY.fullmatch(key)) and match[1] in self._guards:
            self._guards[match[1]].meet(int(match[2]), value)
        return value

    def _guard(self, group: str, rank: int, info: RankInfo) -> None:
        """Raises OSError or ValueError if this system, or this version of gloo, is not what we expect."""
        if info.size > MOST_RANKS:
            if rank == 0:
                _say(f"gloo's ports are open to strangers while {info.size} ranks look for each other")
            return
        listener = _listener(info.address)
        try:
            attach(listener, DROP_DATA)  # at once: whoever connects before this stops the start
            if _connected(info.address):
                host, port = info.address
                raise dist.DistNetworkError(f"somebody connected to {host}:{port} before that port was guarded")
            self._posts = self._posts or self.clone()
        except BaseException:
            with contextlib.suppress(OSError):
                detach(listener)
            listener.close()
            raise
        self._guards[group] = guard = Guard(self._posts, group, rank, info, listener)
        self.guarded += 1
        threading.Thread(target=guard.run, args=(self.timeout.total_seconds(),), name="guard", daemon=True).start()


class Guard:
    """Of one group's port, until its ranks are connected."""

    def __init__(self, posts: RunStore, group: str, rank: int, info: RankInfo, listener: socket.socket) -> None:
        self._posts, self._key, self._rank, self._info = posts, f"ft_dist/guard/{group}", rank, info
        self._listener = listener
        self._others = set(range(info.size)) - {rank}
        self._peers: dict[Address, int] = {}
        """Where the other ranks listen"""
        self._met = threading.Event()
        self._called: dict[Address, int] = {}
        """This rank's sockets, with the ranks that they are connected to"""
        self._admitted: dict[Address, int] = {}
        """The other ranks' sockets that are connected to this one"""
        if not self._others:
            self._met.set()

    def meet(self, rank: int, value: bytes) -> None:
        """gloo has read what a rank publishes. It connects to none of them before it has read all."""
        if rank != self._rank:
            self._peers[rank_info(value).address] = rank
        if len(self._peers) == len(self._others):
            self._met.set()

    def run(self, timeout_s: float) -> None:
        with self._listener:
            try:
                if self._met.wait(timeout_s) and self._connect(time.monotonic() + timeout_s):
                    self._close()
            except dist.DistError:
                return  # rank 0 has gone, and the run with it
            except Exception as error:
                _say(f"rank {self._rank} no longer guards gloo's port: {type(error).__name__}: {first_line(error)}")

    def _connect(self, deadline: float) -> bool:
        """Post this rank's sockets, and let in those that others post; False after the deadline."""
        warn_at = time.monotonic() + WARN_S
        while missing := self._others - {*self._called.values(), *self._admitted.values()}:
            now = time.monotonic()
            if now > deadline:
                return False
            if warn_at and now > warn_at:
                _say(
                    f"rank {self._rank} has waited {WARN_S:.0f} s for gloo's connections to ranks {sorted(missing)}. "
                    "Addresses must not be translated between the nodes of a run."
                )
                warn_at = 0.0
            self._look()
            time.sleep(LOOK_S)
        return True

    def _look(self) -> None:
        waits = False
        for local, remote, _ in _connections():
            if remote in self._peers and local not in self._called:
                peer = self._peers[remote]
                self._posts.append(f"{self._key}/{peer}", f"{self._rank} {local[0]} {local[1]}\n")
                self._called[local] = peer
            waits = waits or (local == self._info.address and remote not in self._admitted)
        posted = self._posted() if waits else {}
        if not posted.keys() - self._admitted.keys():
            return
        for local, remote, connection in _connections():
            if local == self._info.address and remote in posted and remote not in self._admitted:
                with contextlib.suppress(OSError):  # that rank has closed it
                    detach(connection)
                    self._admitted[remote] = posted[remote]

    def _posted(self) -> dict[Address, int]:
        """Sockets that ranks have connected to this one, with those ranks."""
        key = f"{self._key}/{self._rank}"
        if not self._posts.check([key]):
            return {}
        lines = self._posts.get(key).decode().splitlines()
        return {(host, int(port)): int(peer) for peer, host, port in (line.split() for line in lines)}

    def _close(self) -> None:
        """Nobody gets a connection from now on; strangers' connections carry nothing."""
        attach(self._listener, DROP_ALL)
        for local, remote, connection in _connections():
            if local == self._info.address and remote not in self._admitted:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


def _say(text: str) -> None:
    print(f"{socket.gethostname()}: {text}", file=sys.stderr, flush=True)


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


def detach(connection: socket.socket) -> None:
    """Raises OSError, also if the socket has no filter."""
    connection.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)


def _listener(address: Address) -> socket.socket:
    """Raises OSError if no socket of this process listens there."""
    for own in _own_sockets():
        if own.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) and _plain(own.getsockname()) == address:
            return socket.socket(fileno=os.dup(own.fileno()))  # `own.dup()` would make gloo's block
    raise OSError(f"gloo does not listen at {address[0]}:{address[1]}, as it says")


def _connections() -> Iterator[tuple[Address, Address, socket.socket]]:
    """Local and remote address of every connection of this process, with a copy that is closed afterwards."""
    for own in _own_sockets():
        with contextlib.suppress(OSError):
            yield _plain(own.getsockname()), _plain(own.getpeername()), own


def _own_sockets() -> Iterator[socket.socket]:
    """Copies of this process's TCP sockets, each of them closed afterwards. The newest come first, roughly."""
    for number in sorted(map(int, os.listdir("/proc/self/fd")), reverse=True):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            if not os.readlink(f"/proc/self/fd/{number}").startswith("socket:"):
                continue
            copy = os.dup(number)
            stack.callback(os.close, copy)
            own = socket.socket(fileno=copy)  # fails if the number has another file by now
            stack.pop_all()
            with own:
                if own.family in (socket.AF_INET, socket.AF_INET6) and own.type == socket.SOCK_STREAM:
                    yield own


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
