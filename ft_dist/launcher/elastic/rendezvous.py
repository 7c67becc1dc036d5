"""The rendezvous of a run's agents: one listens at the agreed address, the others connect.

The agent that can listen becomes the head: it must be on the machine that has HOST's address, and be the first there.
Only an agent that knows the run's secret is heard (network/gate.py), and only such an agent learns why it is refused.
"""

import errno
import select
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

from ft_dist.errors import UserError
from ft_dist.launcher.elastic.head import Head, Node
from ft_dist.launcher.elastic.messages import FROM_HEAD, FROM_NODES
from ft_dist.launcher.elastic.wire import (
    LONGEST_MESSAGE_BYTES,
    PROTOCOL,
    PURPOSE,
    Connection,
    Message,
    OtherProtocolError,
)
from ft_dist.network.channel import Channel, ConnectionLostError, SecretError
from ft_dist.network.gate import Gate, listen_at
from ft_dist.network.secret import ADVICE, RunSecret
from ft_dist.preflight.node import node_name

MOST_NODES = 4096
ATTEMPT_TIMEOUT_S = 5.0
RETRY_S = 1.0
LOG_INTERVAL_S = 30.0
HELLO_TIMEOUT_S = 10.0
REFUSAL_S = 0.1
"""How long a refusal may take to be sent"""
SECRET_TIMEOUT_S = 90.0
"""How long a shared file system may take to show the head's new secret: NFS hides a new file for up to 60 s"""


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
        if not host or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 65536:
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

    def __init__(self, gate: Gate, rendezvous: Rendezvous, secret: RunSecret) -> None:
        self._gate, self._rendezvous, self._secret = gate, rendezvous, secret
        self._unnamed: dict[Connection, float] = {}
        """Members that have not said hello yet, with the time at which they came"""
        self._joined: dict[Connection, tuple[Node, str]] = {}

    @classmethod
    def open(cls, rendezvous: Rendezvous, secret: RunSecret) -> "RendezvousServer | None":
        """None if the address is not this machine's, or if another agent already listens there."""
        try:
            listener = listen_at(rendezvous.host, rendezvous.port, several_nodes=True)
        except socket.gaierror:
            return None
        except OSError as error:
            if error.errno in (errno.EADDRNOTAVAIL, errno.EADDRINUSE):
                return None
            raise UserError(f"--rdzv {rendezvous}: cannot listen there ({error.strerror}). Use another port.") from None
        try:
            known = secret.create()
        except UserError:
            listener.close()
            raise
        gate = Gate(listener, known, purpose=PURPOSE, longest=LONGEST_MESSAGE_BYTES)
        return cls(gate, rendezvous, secret)

    def __enter__(self) -> "RendezvousServer":
        return self

    def __exit__(self, *_: object) -> None:
        for connection in [*self._joined, *self._unnamed]:
            self._gate.leave(connection.channel)
            connection.finish()
        self._secret.remove()  # before the next head can listen and write its own
        self._gate.close()

    def wait(self, timeout_s: float) -> None:
        """Wait until something has arrived."""
        self._gate.wait(timeout_s)

    def serve(self, head: Head) -> None:
        """Handle messages that have arrived, and accept connections. Waits only REFUSAL_S for each refused agent."""
        for connection, (node, _) in list(self._joined.items()):
            try:
                for message in connection.receive():
                    _dispatch(message, node, head)
            except ConnectionLostError as error:
                self._drop(connection)
                head.lose(node, str(error))
        for channel in self._gate.admit():
            self._unnamed[Connection(channel, FROM_NODES)] = time.monotonic()
        for connection, since in list(self._unnamed.items()):
            self._await_hello(connection, since, head)

    def _await_hello(self, connection: Connection, since: float, head: Head) -> None:
        try:
            messages = connection.receive()
        except OtherProtocolError:
            self._refuse(connection, "its agent runs another ft_dist version. Install the same one on every node.")
            return
        except ConnectionLostError:
            self._drop(connection)
            return
        if not messages:
            if time.monotonic() - since > HELLO_TIMEOUT_S:
                self._drop(connection)
            return
        hello, *others = messages
        problem = self._refusal(hello)
        if problem is None:
            del self._unnamed[connection]
            self._drop_earlier(hello, head)
            connection.send({"type": "welcome"})
            connection.unread(others)
            node = Node(hello["node"], hello["nproc"], connection.send)
            self._joined[connection] = node, hello["agent"]
            head.join(node)
            return
        self._refuse(connection, problem)

    def _refuse(self, connection: Connection, why: str) -> None:
        connection.send({"type": "refused", "why": why})
        del self._unnamed[connection]
        self._gate.leave(connection.channel)
        connection.finish(timeout_s=REFUSAL_S)

    def _refusal(self, hello: Message) -> str | None:
        own = self._rendezvous.hello()
        if hello["type"] != "hello":
            return "it did not say hello"
        names = {"run_id": "run", "code": "ft_dist's source", "config": "the resolved config"}
        differing = [key for key in names if hello[key] != own[key]]
        other = [f"{names[key]} is {hello[key]}, but {own[key]} here" for key in differing]
        if other:
            return (
                f"{hello['node']}: {', '.join(other)}. Give each run its own port, and all its nodes the same code, "
                "config and --run-id."
            )
        return f"{MOST_NODES} nodes have joined already" if len(self._joined) >= MOST_NODES else None

    def _drop_earlier(self, hello: Message, head: Head) -> None:
        """An agent that rejoins knows that its earlier connection is lost, perhaps before this side does."""
        for connection, (node, agent) in list(self._joined.items()):
            if agent == hello["agent"]:
                self._drop(connection)
                head.lose(node, "it rejoins")

    def _drop(self, connection: Connection) -> None:
        self._joined.pop(connection, None)
        self._unnamed.pop(connection, None)
        self._gate.drop(connection.channel)


def _dispatch(message: Message, node: Node, head: Head) -> None:
    if message["type"] == "ended":
        head.worker_ended(node, message["round"], message["rank"], message["code"])
    elif message["type"] == "leaving":
        head.leave(node, message["number"])


def connect(
    rendezvous: Rendezvous,
    hello: Message,
    *,
    secret: RunSecret,
    timeout_s: float,
    stop: Callable[[], bool],
    say: Callable[[str], None],
) -> Connection | None:
    """A connection that the head has accepted; None if `stop()` is true, or after `timeout_s`, which is logged.

    Raises UserError if the head refuses, or if this agent and the listener do not share a secret.
    """
    started = logged_at = time.monotonic()
    strange_since: float | None = None
    while not stop():
        problem = "no agent is listening there"
        now = time.monotonic()
        try:
            return _greet(rendezvous, hello, secret.read())
        except SecretError as error:
            strange_since = strange_since or now
            problem = f"{error}; another program may be listening there, or its secret is not that of {secret.source}"
            if now - strange_since > SECRET_TIMEOUT_S:
                raise UserError(
                    f"--rdzv {rendezvous}: {problem}. Give each run its own port; if the nodes do not share "
                    f"output_dir, {ADVICE}."
                ) from None
        except (OSError, ConnectionLostError) as error:
            strange_since = None
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


def _greet(rendezvous: Rendezvous, hello: Message, secret: str | None) -> Connection:
    """Raises OSError, ConnectionLostError, SecretError, and UserError if the head refuses."""
    peer = socket.create_connection((rendezvous.host, rendezvous.port), timeout=ATTEMPT_TIMEOUT_S)
    try:
        if peer.getsockname() == peer.getpeername():  # as TCP allows on one machine
            raise ConnectionLostError("no agent answers there")
        if secret is None:
            raise SecretError("there is no secret yet")
        channel = Channel(peer, secret, purpose=PURPOSE, serves=False, longest=LONGEST_MESSAGE_BYTES)
        deadline = time.monotonic() + HELLO_TIMEOUT_S
        while not channel.ready:
            channel.receive()
            _await_input(peer, deadline)
        connection = Connection(channel, FROM_HEAD)
        connection.send({**rendezvous.hello(), **hello})
        while not (messages := connection.receive()):
            _await_input(peer, deadline)
        if messages[0]["type"] == "refused":
            raise UserError(f"--rdzv {rendezvous}: refused: {messages[0]['why']}")
        connection.unread(messages[1:])
        return connection
    except BaseException:
        peer.close()
        raise


def _await_input(peer: socket.socket, deadline: float) -> None:
    """Wait a moment for input. Raises ConnectionLostError after the deadline."""
    if time.monotonic() > deadline:
        raise ConnectionLostError("it does not answer; another program may be listening there")
    poll = select.poll()
    poll.register(peer, select.POLLIN)
    poll.poll(50)
