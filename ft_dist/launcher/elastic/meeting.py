"""Where the agents of a run meet: one listens at the agreed address, the others connect.

Who listens is settled by who can: only the machine that has HOST's address, and of several agents there the first.
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
from ft_dist.launcher.elastic.head import Head, Member
from ft_dist.launcher.elastic.wire import Connection, ConnectionLostError, Message
from ft_dist.preflight.node import node_name

PROTOCOL = 1
ATTEMPT_S = 5.0
RETRY_S = 1.0
TELL_INTERVAL_S = 30.0
HELLO_S = 10.0


@dataclass(frozen=True)
class Place:
    """HOST:PORT, and the run that meets there: its name, and hashes of its code and config."""

    host: str
    port: int
    run_id: str
    code: str
    config: str

    @classmethod
    def parse(cls, text: str, *, run_id: str, code: str, config: str) -> "Place":
        """Raises UserError."""
        host, _, port = text.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise UserError(f"--rdzv {text} is not HOST:PORT, for example node0:29400.")
        return cls(host.strip("[]"), int(port), run_id, code, config)

    def hello(self) -> Message:
        """What an agent says of the run that it was started for."""
        run = {"run_id": self.run_id, "code": self.code, "config": self.config}
        return {"type": "hello", "protocol": PROTOCOL, **run}

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


class Meeting:
    """The head's side: takes in the other agents and passes on what they say."""

    def __init__(self, listener: socket.socket, place: Place) -> None:
        self._listener, self._place = listener, place
        self._strangers: dict[Connection, float] = {}
        self._members: dict[Connection, tuple[Member, str]] = {}

    @classmethod
    def open(cls, place: Place) -> "Meeting | None":
        """None where the address is not this machine's, or another agent listens there already."""
        try:
            family, *_, address = socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)[0]
        except OSError:
            return None
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if not _is_literal(place.host):
                # a name may mean 127.0.1.1 here and an address of the network elsewhere
                with socket.socket(family, socket.SOCK_STREAM) as probe:
                    probe.bind((address[0], 0))
                address = ("", place.port)
            listener.bind(address)
            listener.listen(1024)
        except OSError as error:
            listener.close()
            if error.errno in (errno.EADDRNOTAVAIL, errno.EADDRINUSE):
                return None
            raise UserError(f"--rdzv {place}: cannot listen there ({error.strerror}). Use another port.") from None
        listener.setblocking(False)
        return cls(listener, place)

    def __enter__(self) -> "Meeting":
        return self

    def __exit__(self, *_: object) -> None:
        for connection in [*self._members, *self._strangers]:
            connection.finish()
        self._listener.close()

    def sockets(self) -> list[Any]:
        return [self._listener, *(connection.socket for connection in (*self._members, *self._strangers))]

    def serve(self, head: Head) -> None:
        """Take in what has arrived; never waits."""
        with contextlib.suppress(BlockingIOError, InterruptedError, ConnectionError):
            while True:
                peer, _ = self._listener.accept()
                self._strangers[Connection(peer)] = time.monotonic()
        for connection, since in list(self._strangers.items()):
            self._hear_stranger(connection, since, head)
        for connection, (member, _) in list(self._members.items()):
            try:
                for message in connection.receive():
                    _pass_on(message, member, head)
            except (ConnectionLostError, KeyError, TypeError, ValueError) as error:
                connection.close()
                del self._members[connection]
                head.lose(member, str(error))

    def _hear_stranger(self, connection: Connection, since: float, head: Head) -> None:
        try:
            messages = connection.receive()
        except ConnectionLostError:
            messages = [{}]
        if not messages and time.monotonic() - since < HELLO_S:
            return
        del self._strangers[connection]
        problem = self._refusal(messages[0] if messages else {})
        if problem is None:
            hello = messages[0]
            self._forget_former(hello, head)
            connection.send({"type": "welcome"})
            member = Member(str(hello["node"]), int(hello["nproc"]), connection.send)
            self._members[connection] = member, str(hello["agent"])
            head.join(member)
            return
        connection.send({"type": "refused", "why": problem})
        connection.finish(timeout_s=0.1)

    def _refusal(self, hello: Message) -> str | None:
        try:
            own = self._place.hello()
            names = {"run_id": "run", "code": "ft_dist's source", "config": "the resolved config"}
            other = [
                f"{name} is {hello[key]}, but {own[key]} here" for key, name in names.items() if hello[key] != own[key]
            ]
            if other or hello["type"] != "hello" or hello["protocol"] != PROTOCOL:
                return (
                    f"{hello['node']}: {', '.join(other) or 'an agent of another ft_dist'}. Give each run a port of "
                    "its own, and all its nodes the same code, config and --run-id."
                )
            str(hello["agent"])
            return None if int(hello["nproc"]) > 0 else "it has no workers"
        except (KeyError, TypeError, ValueError):
            return "this is not an agent of ft_dist"

    def _forget_former(self, hello: Message, head: Head) -> None:
        """An agent that joins again knows that its former connection is lost, perhaps before we do."""
        for connection, (member, agent) in list(self._members.items()):
            if agent == hello["agent"]:
                connection.close()
                del self._members[connection]
                head.lose(member, "it joins again")


def _pass_on(message: Message, member: Member, head: Head) -> None:
    if message["type"] == "ended":
        code = message["code"]
        head.worker_ended(member, int(message["round"]), int(message["rank"]), None if code is None else int(code))
    elif message["type"] == "leaving":
        head.leave(member, int(message["number"]))


def connect(
    place: Place, hello: Message, *, timeout_s: float, stop: Callable[[], bool], say: Callable[[str], None]
) -> Connection | None:
    """A connection that the head has welcomed; None when `stop` says so or after `timeout_s`, which is told.

    Raises UserError where the head refuses.
    """
    started = told_at = time.monotonic()
    while not stop():
        problem = "nobody listens there"
        try:
            return _greet(place, hello)
        except (OSError, ConnectionLostError) as error:
            problem = getattr(error, "strerror", None) or str(error) or problem
        now = time.monotonic()
        if now - started >= timeout_s:
            say(f"error: {node_name()} could not reach the head at {place} within {timeout_s:.0f} s: {problem}.")
            return None
        if now - told_at >= TELL_INTERVAL_S:
            told_at = now
            say(f"{node_name()} waits for the head at {place}: {problem}")
        time.sleep(RETRY_S)
    return None


def _greet(place: Place, hello: Message) -> Connection:
    """Raises OSError, ConnectionLostError, and UserError where the head refuses."""
    peer = socket.create_connection((place.host, place.port), timeout=ATTEMPT_S)
    connection = Connection(peer)
    try:
        connection.send({**place.hello(), **hello})
        deadline = time.monotonic() + HELLO_S
        while time.monotonic() < deadline:
            if messages := connection.receive():
                if messages[0]["type"] == "refused":
                    raise UserError(f"--rdzv {place}: refused: {messages[0]['why']}")
                connection.give_back(messages[1:])
                return connection
            time.sleep(0.02)
        raise ConnectionLostError("it does not answer; another program may listen there")
    except BaseException:
        connection.close()
        raise


def _is_literal(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
