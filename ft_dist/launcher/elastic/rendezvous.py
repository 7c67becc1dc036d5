"""The rendezvous of a run's agents: one listens at the agreed address, the others connect.

The agent that can listen becomes the head: it must be on the machine that has HOST's address, and be the first there.
"""

import contextlib
import errno
import ipaddress
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ft_dist.errors import UserError
from ft_dist.launcher.elastic.head import Head, Node
from ft_dist.launcher.elastic.wire import Connection, ConnectionLostError, Message
from ft_dist.preflight.node import node_name

PROTOCOL = 1
ATTEMPT_TIMEOUT_S = 5.0
RETRY_S = 1.0
LOG_INTERVAL_S = 30.0
HELLO_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Rendezvous:
    """HOST:PORT, and the run whose agents meet there: its name, and hashes of its code and config."""

    host: str
    port: int
    run_id: str
    code: str
    config: str

    @classmethod
    def parse(cls, text: str, *, run_id: str, code: str, config: str) -> "Rendezvous":
        """Raises UserError."""
        host, _, port = text.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise UserError(f"--rdzv {text}: should be HOST:PORT, for example node0:29400.")
        return cls(host.strip("[]"), int(port), run_id, code, config)

    def hello(self) -> Message:
        """How an agent names the run for which it was started."""
        run = {"run_id": self.run_id, "code": self.code, "config": self.config}
        return {"type": "hello", "protocol": PROTOCOL, **run}

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


class RendezvousServer:
    """The head's side: accepts the other agents and passes their messages to the head."""

    def __init__(self, listener: socket.socket, rendezvous: Rendezvous) -> None:
        self._listener, self._rendezvous = listener, rendezvous
        self._pending: dict[Connection, float] = {}
        self._joined: dict[Connection, tuple[Node, str]] = {}

    @classmethod
    def open(cls, rendezvous: Rendezvous) -> "RendezvousServer | None":
        """None if the address is not this machine's, or if another agent already listens there."""
        try:
            family, *_, address = socket.getaddrinfo(rendezvous.host, rendezvous.port, type=socket.SOCK_STREAM)[0]
        except OSError:
            return None
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if not _is_ip_address(rendezvous.host):
                # a name may resolve to 127.0.1.1 here and to a network address on other machines
                with socket.socket(family, socket.SOCK_STREAM) as probe:
                    probe.bind((address[0], 0))
                address = ("", rendezvous.port)
            listener.bind(address)
            listener.listen(1024)
        except OSError as error:
            listener.close()
            if error.errno in (errno.EADDRNOTAVAIL, errno.EADDRINUSE):
                return None
            raise UserError(f"--rdzv {rendezvous}: cannot listen there ({error.strerror}). Use another port.") from None
        listener.setblocking(False)
        return cls(listener, rendezvous)

    def __enter__(self) -> "RendezvousServer":
        return self

    def __exit__(self, *_: object) -> None:
        for connection in [*self._joined, *self._pending]:
            connection.finish()
        self._listener.close()

    def sockets(self) -> list[Any]:
        return [self._listener, *(connection.socket for connection in (*self._joined, *self._pending))]

    def serve(self, head: Head) -> None:
        """Accept connections and handle messages that have arrived. Never blocks."""
        with contextlib.suppress(BlockingIOError, InterruptedError, ConnectionError):
            while True:
                peer, _ = self._listener.accept()
                self._pending[Connection(peer)] = time.monotonic()
        for connection, since in list(self._pending.items()):
            self._await_hello(connection, since, head)
        for connection, (node, _) in list(self._joined.items()):
            try:
                for message in connection.receive():
                    _dispatch(message, node, head)
            except (ConnectionLostError, KeyError, TypeError, ValueError) as error:
                connection.close()
                del self._joined[connection]
                head.lose(node, str(error))

    def _await_hello(self, connection: Connection, since: float, head: Head) -> None:
        try:
            messages = connection.receive()
        except ConnectionLostError:
            messages = [{}]
        if not messages and time.monotonic() - since < HELLO_TIMEOUT_S:
            return
        del self._pending[connection]
        problem = self._refusal(messages[0] if messages else {})
        if problem is None:
            hello = messages[0]
            self._drop_earlier(hello, head)
            connection.send({"type": "welcome"})
            node = Node(str(hello["node"]), int(hello["nproc"]), connection.send)
            self._joined[connection] = node, str(hello["agent"])
            head.join(node)
            return
        connection.send({"type": "refused", "why": problem})
        connection.finish(timeout_s=0.1)

    def _refusal(self, hello: Message) -> str | None:
        try:
            own = self._rendezvous.hello()
            names = {"run_id": "run", "code": "ft_dist's source", "config": "the resolved config"}
            other = [
                f"{name} is {hello[key]}, but {own[key]} here" for key, name in names.items() if hello[key] != own[key]
            ]
            if other or hello["type"] != "hello" or hello["protocol"] != PROTOCOL:
                return (
                    f"{hello['node']}: {', '.join(other) or 'its agent runs another ft_dist version'}. Give each run "
                    "its own port, and all its nodes the same code, config and --run-id."
                )
            str(hello["agent"])
            return None if int(hello["nproc"]) > 0 else "this node has no workers"
        except (KeyError, TypeError, ValueError):
            return "this is not an agent of ft_dist"

    def _drop_earlier(self, hello: Message, head: Head) -> None:
        """An agent that rejoins knows that its earlier connection is lost, perhaps before this side does."""
        for connection, (node, agent) in list(self._joined.items()):
            if agent == hello["agent"]:
                connection.close()
                del self._joined[connection]
                head.lose(node, "it rejoins")


def _dispatch(message: Message, node: Node, head: Head) -> None:
    if message["type"] == "ended":
        code = message["code"]
        head.worker_ended(node, int(message["round"]), int(message["rank"]), None if code is None else int(code))
    elif message["type"] == "leaving":
        head.leave(node, int(message["number"]))


def connect(
    rendezvous: Rendezvous, hello: Message, *, timeout_s: float, stop: Callable[[], bool], say: Callable[[str], None]
) -> Connection | None:
    """A connection that the head has accepted; None if `stop()` is true, or after `timeout_s`, which is logged.

    Raises UserError if the head refuses.
    """
    started = logged_at = time.monotonic()
    while not stop():
        problem = "no agent is listening there"
        try:
            return _greet(rendezvous, hello)
        except (OSError, ConnectionLostError) as error:
            problem = getattr(error, "strerror", None) or str(error) or problem
        now = time.monotonic()
        if now - started >= timeout_s:
            say(f"error: {node_name()} could not reach the head at {rendezvous} within {timeout_s:.0f} s: {problem}.")
            return None
        if now - logged_at >= LOG_INTERVAL_S:
            logged_at = now
            say(f"{node_name()} is waiting for the head at {rendezvous}: {problem}")
        time.sleep(RETRY_S)
    return None


def _greet(rendezvous: Rendezvous, hello: Message) -> Connection:
    """Raises OSError, ConnectionLostError, and UserError if the head refuses."""
    peer = socket.create_connection((rendezvous.host, rendezvous.port), timeout=ATTEMPT_TIMEOUT_S)
    connection = Connection(peer)
    with contextlib.ExitStack() as on_failure:
        on_failure.callback(connection.close)
        connection.send({**rendezvous.hello(), **hello})
        deadline = time.monotonic() + HELLO_TIMEOUT_S
        while time.monotonic() < deadline:
            if messages := connection.receive():
                if messages[0]["type"] == "refused":
                    raise UserError(f"--rdzv {rendezvous}: refused: {messages[0]['why']}")
                if messages[0]["type"] != "welcome":  # connected to itself, as TCP allows on one machine
                    raise ConnectionLostError("no agent answers there")
                connection.unread(messages[1:])
                on_failure.pop_all()
                return connection
            time.sleep(0.02)
        raise ConnectionLostError("it does not answer; another program may be listening there")


def _is_ip_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
