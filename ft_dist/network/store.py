"""The ranks' key-value store, as torch's process groups expect it, over authenticated connections.

torch's own TCPStore lets anybody who reaches its port read, change and delete every key: the addresses at which ranks
meet, the posts of the checkpoint writer, the decisions of rank 0. This one serves members of the run only, from a
thread of rank 0.
"""

import contextlib
import errno
import select
import socket
import struct
import threading
import time
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from ft_dist.network.channel import Channel, ConnectionLostError
from ft_dist.network.gate import Gate

PURPOSE = "store"
LONGEST_MESSAGE_BYTES = 2**23
"""A key and its value may take half of it"""
ATTEMPT_TIMEOUT_S = 15.0
RECONNECT_S = 10.0
RETRY_S = 0.05
IDLE_S, SENDING_S = 1.0, 0.01
SIZE = struct.Struct(">I")
SET, GET, ADD, CHECK, COMPARE_SET, DELETE, COUNT, APPEND, WAIT = (b"%c" % code for code in b"SGACXDNPW")
YES, NO = b"1", b"0"


class StoreServer:
    """Serves the keys of one world until the process ends. A request that makes no sense ends its connection."""

    def __init__(self, listener: socket.socket, secret: str) -> None:
        self.port = int(listener.getsockname()[1])
        self._gate = Gate(listener, secret, purpose=PURPOSE, longest=LONGEST_MESSAGE_BYTES)
        self._values: dict[bytes, bytes] = {}
        self._waiting: dict[Channel, list[bytes]] = {}
        self._sending: set[Channel] = set()
        threading.Thread(target=self._serve, name="store", daemon=True).start()

    def _serve(self) -> None:
        while True:
            ready = self._gate.wait(SENDING_S if self._sending else IDLE_S)
            for channel in {*ready, *self._sending}:
                self._hear(channel)
            self._gate.admit()

    def _hear(self, channel: Channel) -> None:
        try:
            for request in channel.receive():
                operation, *fields = _unpack(request)
                if operation == WAIT:
                    self._waiting[channel] = fields
                else:
                    channel.send(_pack(*self._answer(operation, fields)))
                self._answer_waiting()
        except (ConnectionLostError, ValueError, struct.error):
            self._waiting.pop(channel, None)
            self._sending.discard(channel)
            self._gate.drop(channel)
            return
        (self._sending.add if channel.sending else self._sending.discard)(channel)

    def _answer_waiting(self) -> None:
        for channel, keys in list(self._waiting.items()):
            if all(key in self._values for key in keys):
                del self._waiting[channel]
                channel.send(_pack(YES))

    def _answer(self, operation: bytes, fields: list[bytes]) -> list[bytes]:
        """Raises ValueError for a request that makes no sense."""
        values = self._values
        if operation == CHECK:
            return [YES if all(key in values for key in fields) else NO]
        if operation == COUNT:
            return [str(len(values)).encode()]
        key, *rest = fields
        if operation == GET:
            return [values[key]] if key in values else []
        if operation == DELETE:
            return [NO if values.pop(key, None) is None else YES]
        if operation == COMPARE_SET:
            expected, wanted = rest
            if values.get(key, b"") == expected:
                values[key] = wanted
            return [values.get(key, expected)]
        (value,) = rest
        if operation == ADD:
            value = str(int(values.get(key, b"0")) + int(value)).encode()
        elif operation == APPEND:
            value = values.get(key, b"") + value
        elif operation != SET:
            raise ValueError(f"{operation!r} is not an operation of the store")
        if len(key) + len(value) > LONGEST_MESSAGE_BYTES // 2:
            raise ValueError("too long a value")
        values[key] = value
        return [value if operation == ADD else YES]


_alive: "list[RunStore]" = []
"""torch calls these from C++, which does not keep a Python object alive"""


class RunStore(dist.Store):
    """A client, with one connection, which a thread holds while it waits: `clone` it for another thread."""

    def __init__(self, host: str, port: int, secret: str, *, timeout: timedelta) -> None:
        """Waits for the server. Raises DistNetworkError after `timeout`."""
        super().__init__()
        self.set_timeout(timeout)
        self._host, self._port, self._secret = host, port, secret
        self._lock = threading.Lock()
        self._channel: Channel | None = self._connect(timeout.total_seconds(), await_server=True)
        _alive.append(self)

    def set(self, key: str, value: bytes | str) -> None:
        self._ask(SET, key.encode(), _bytes(value))

    def get(self, key: str) -> bytes:
        """Waits until the key exists. Raises DistStoreError after the store's timeout."""
        while True:
            if found := self._ask(GET, key.encode()):
                return found[0]
            self.wait([key])

    def add(self, key: str, amount: int) -> int:
        return int(self._ask(ADD, key.encode(), str(amount).encode())[0])

    def check(self, keys: Sequence[str]) -> bool:
        return self._ask(CHECK, *(key.encode() for key in keys)) == [YES]

    def compare_set(self, key: str, expected: bytes | str, wanted: bytes | str) -> bytes:
        return self._ask(COMPARE_SET, key.encode(), _bytes(expected), _bytes(wanted))[0]

    def delete_key(self, key: str) -> bool:
        return self._ask(DELETE, key.encode()) == [YES]

    def num_keys(self) -> int:
        return int(self._ask(COUNT)[0])

    deleteKey, getNumKeys = delete_key, num_keys  # noqa: N815 - the names by which torch calls them

    def append(self, key: str, value: bytes | str) -> None:
        self._ask(APPEND, key.encode(), _bytes(value))

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Raises DistStoreError if a key does not exist after `timeout`, or the store's."""
        self._ask(WAIT, *(key.encode() for key in keys), timeout_s=(timeout or self.timeout).total_seconds())

    def clone(self) -> "RunStore":
        return RunStore(self._host, self._port, self._secret, timeout=self.timeout)

    def has_extended_api(self) -> bool:
        return False

    def _ask(self, operation: bytes, *fields: bytes, timeout_s: float | None = None) -> list[bytes]:
        deadline = time.monotonic() + (self.timeout.total_seconds() if timeout_s is None else timeout_s)
        request = _pack(operation, *fields)
        if len(request) > LONGEST_MESSAGE_BYTES // 2:
            raise ValueError(f"{len(request)} bytes are too many for the store")
        with self._lock:
            channel = self._channel or self._connect(RECONNECT_S, await_server=False)
            self._channel = None  # unless the answer arrives, the connection is of no more use
            try:
                channel.send(request)
                while not (answers := channel.receive()):
                    if not _await_input(channel, deadline):
                        channel.close()
                        keys = b", ".join(fields).decode(errors="replace")[:200]
                        raise dist.DistStoreError(f"no answer from rank 0's store in time ({keys})")
            except ConnectionLostError as error:
                channel.close()
                raise dist.DistNetworkError(f"rank 0's store at {self._host}:{self._port}: {error}") from None
            self._channel = channel
            return _unpack(answers[0])

    def _connect(self, timeout_s: float, *, await_server: bool) -> Channel:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return self._greet()
            except (OSError, ConnectionLostError) as error:
                gone = isinstance(error, OSError) and error.errno == errno.ECONNREFUSED and not await_server
                if gone or time.monotonic() > deadline:
                    reason = getattr(error, "strerror", None) or error
                    raise dist.DistNetworkError(f"rank 0's store at {self._host}:{self._port}: {reason}") from None
            time.sleep(RETRY_S)

    def _greet(self) -> Channel:
        peer = socket.create_connection((self._host, self._port), timeout=ATTEMPT_TIMEOUT_S)
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(peer.close)
            channel = Channel(peer, self._secret, purpose=PURPOSE, serves=False, longest=LONGEST_MESSAGE_BYTES)
            deadline = time.monotonic() + ATTEMPT_TIMEOUT_S
            while not channel.ready:
                channel.receive()
                if not channel.ready and not _await_input(channel, deadline):
                    raise ConnectionLostError("it does not answer")
            on_failure.pop_all()
        return channel


def _await_input(channel: Channel, deadline: float) -> bool:
    """Wait until the connection has input, or takes more output; False after the deadline."""
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        return False
    poll = select.poll()
    poll.register(channel.socket, select.POLLIN | (select.POLLOUT if channel.sending else 0))
    poll.poll(min(left_s, 60.0) * 1000)
    return True


def _bytes(value: bytes | str) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)


def _pack(*fields: bytes) -> bytes:
    return b"".join(part for field in fields for part in (SIZE.pack(len(field)), field))


def _unpack(message: bytes) -> list[bytes]:
    """Raises ValueError or struct.error for anything that `_pack` does not write."""
    fields, at = [], 0
    while at < len(message):
        (size,) = SIZE.unpack_from(message, at)
        at += SIZE.size + size
        if at > len(message):
            raise ValueError("a field longer than its message")
        fields.append(message[at - size : at])
    return fields
