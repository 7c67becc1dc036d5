"""Strangers at the rendezvous of a real head, and members that lie: the run does not notice."""

import contextlib
import errno
import json
import resource
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from ft_dist.errors import UserError
from ft_dist.launcher.elastic import rendezvous as rendezvous_module
from ft_dist.launcher.elastic.head import Head, Node
from ft_dist.launcher.elastic.messages import FROM_HEAD
from ft_dist.launcher.elastic.rendezvous import Rendezvous, RendezvousServer, connect
from ft_dist.launcher.elastic.restarts import RestartPolicy
from ft_dist.launcher.elastic.wire import LONGEST_MESSAGE_BYTES, PURPOSE, Connection
from ft_dist.network import gate as gate_module
from ft_dist.network.channel import Channel, ConnectionLostError
from ft_dist.network.secret import VARIABLE, RunSecret
from tests.ports import free_port

HELLO = {"node": "second", "nproc": 1, "agent": "a"}
CONFIG = "0123456789ab"


class Scene:
    """A head with one node of its own, and the rendezvous at which others may come."""

    def __init__(self, path) -> None:
        self.said: list[str] = []
        self.here = Rendezvous("127.0.0.1", free_port(), "the-run", "code", CONFIG)
        self.secret = RunSecret(path / "run" / "launch" / "secret")
        server = RendezvousServer.open(self.here, self.secret)
        assert server
        self.server = server
        self.inbox: list[dict] = []
        self.own = Node("first", 1, self.inbox.append)
        self.head = Head(
            minimum=2,
            maximum=2,
            policy=RestartPolicy(3, path),
            run_dir=path,
            grows_at_commits=True,
            join_timeout_s=60.0,
            master=lambda: ("127.0.0.1", 1),
            say=self.said.append,
        )
        self.head.join(self.own)

    def turn(self, until: Callable[[], object] = lambda: False, seconds: float = 5.0) -> None:
        """Run the head until something is true."""
        deadline = time.monotonic() + seconds
        while not until() and time.monotonic() < deadline:
            self.server.serve(self.head)
            self.head.tick()
            self.server.wait(0.01)

    def dial(self) -> socket.socket:
        return socket.create_connection((self.here.host, self.here.port), timeout=5)

    def member(self, hello: dict | None = None) -> Connection:
        """A member; `hello` is what it says, whatever that is."""
        channel = Channel(self.dial(), self.secret.value, purpose=PURPOSE, serves=False, longest=LONGEST_MESSAGE_BYTES)
        self.turn(lambda: channel.receive() or channel.ready)
        connection = Connection(channel, FROM_HEAD)
        if hello is not None:
            connection.send(hello)
            self.turn(lambda: channel.socket.fileno() >= 0 and _readable(connection))
        return connection

    def joins(self) -> Connection:
        """A real node can still join, and the run starts."""
        connection = self.member({**self.here.hello(), **HELLO})
        found: list[dict] = []
        self.turn(lambda: found.extend(connection.receive()) or len(found) >= 2)
        assert [message["type"] for message in found] == ["welcome", "start"]
        assert self.head.over is None
        return connection

    def ends(self, connection: Connection, code: int) -> None:
        """The real node's worker ends."""
        connection.send({"type": "ended", "round": 1, "rank": 1, "code": code})
        self.turn(lambda: 1 not in self.head._round.running)


def _readable(connection: Connection) -> bool:
    connection.unread(connection.receive())
    return bool(connection._put_back)


@pytest.fixture
def scene(tmp_path, monkeypatch) -> Iterator[Scene]:
    monkeypatch.delenv(VARIABLE, raising=False)
    scene = Scene(tmp_path)
    yield scene
    with scene.server:
        pass


def answer(peer: socket.socket) -> bytes:
    """All that a stranger ever receives."""
    found = b""
    peer.settimeout(0.05)
    try:
        while data := peer.recv(65536):
            found += data
    except OSError:
        pass
    return found


OLD_HELLO = {"type": "hello", "protocol": 1, "run_id": "?", "code": "?", "config": "?", "node": "x", "agent": "x"}
LINES = {
    "deep": b"[" * 200_000 + b"\n",
    "infinite": json.dumps({**OLD_HELLO, "nproc": 1}).replace('"nproc": 1', '"nproc": 1e999').encode() + b"\n",
    "huge": json.dumps({**OLD_HELLO, "nproc": 3_000_000}).encode() + b"\n",
    "nameless": json.dumps({key: value for key, value in OLD_HELLO.items() if key != "node"}).encode() + b"\n",
    "hello": json.dumps({**OLD_HELLO, "nproc": 1}).encode() + b"\n",
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 10,
    "zeros": bytes(1_000_000),
}


@pytest.mark.parametrize("line", LINES.values(), ids=LINES.keys())
def test_a_stranger_learns_nothing_whatever_it_sends(scene, line):
    with scene.dial() as stranger:
        scene.turn(seconds=0.1)
        stranger.settimeout(0.2)
        with contextlib.suppress(OSError):  # the head has closed it
            stranger.sendall(line)
        scene.turn(seconds=0.2)
        heard = answer(stranger)
    assert len(heard) <= 32, "random bytes, and never the same"
    assert scene.head.over is None
    scene.joins()


def test_connections_by_the_thousand_leave_room_for_members(scene):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 3000:
        pytest.skip("too few descriptors for the strangers")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 3000), hard))
    joined = scene.joins()
    strangers = []
    for number in range(1200):
        strangers.append(scene.dial())
        if number % 100 == 0:
            scene.turn(seconds=0.05)
    scene.turn(seconds=1.5)
    assert len(scene.server._gate._strangers) <= gate_module.MOST_STRANGERS
    scene.ends(joined, 0)
    for stranger in strangers:
        stranger.close()


def test_a_head_without_descriptors_waits_and_does_not_spin(scene, monkeypatch):
    turns = 0

    class Exhausted:
        def accept(self):
            nonlocal turns
            turns += 1
            raise OSError(errno.EMFILE, "Too many open files")

        def close(self) -> None:
            pass

    joined = scene.joins()
    real, scene.server._gate._listener = scene.server._gate._listener, Exhausted()
    with scene.dial():
        scene.turn(seconds=0.5)
        assert turns == 1
        scene.ends(joined, 0)
    scene.server._gate._listener = real


def test_one_endless_connection_does_not_delay_the_others(scene, monkeypatch):
    joined = scene.joins()
    endless = scene.member()
    endless.socket.setblocking(False)
    silent_since = time.monotonic()
    while time.monotonic() < silent_since + 1.0:
        with contextlib.suppress(OSError):
            # a message that never ends
            endless.socket.send(struct.pack(">I", LONGEST_MESSAGE_BYTES) + bytes(65536))
        scene.server.serve(scene.head)
    scene.ends(joined, 0)


def test_strangers_that_say_nothing_are_dropped(scene, monkeypatch):
    monkeypatch.setattr(gate_module, "PROOF_TIMEOUT_S", 0.2)
    with scene.dial() as silent:
        scene.turn(lambda: scene.server._gate._strangers)
        scene.turn(lambda: not scene.server._gate._strangers)
        silent.settimeout(1)
        assert len(silent.recv(100)) == 32
        assert silent.recv(100) == b""


def test_recorded_traffic_is_worth_nothing(scene):
    """Neither to the head nor back to the agent."""
    recorded = bytearray()
    channel = Channel(scene.dial(), scene.secret.value, purpose=PURPOSE, serves=False, longest=LONGEST_MESSAGE_BYTES)
    real_send = channel.socket.send

    class Recording:
        def __getattr__(self, name):
            return getattr(real, name)

        def send(self, data):
            sent = real_send(data)
            recorded.extend(bytes(data)[:sent])
            return sent

    real, channel.socket = channel.socket, Recording()
    scene.turn(lambda: channel.receive() or channel.ready)
    connection = Connection(channel, FROM_HEAD)
    connection.send({**scene.here.hello(), **HELLO})
    scene.turn(lambda: _readable(connection))
    scene.ends(connection, 0)
    assert len(scene.server._joined) == 1
    for part in (recorded, recorded[:64], recorded[64:], recorded[64:] * 2):
        with scene.dial() as replayed:
            scene.turn(seconds=0.05)
            replayed.sendall(part)
            scene.turn(seconds=0.1)
            assert len(answer(replayed)) == 32
    assert len(scene.server._joined) == 1
    # the same messages again, within their own connection
    real.setblocking(True)
    real.sendall(recorded[64:])
    scene.turn(lambda: not scene.server._joined)
    assert any("forged" in line for line in scene.said)


def test_what_the_head_sends_cannot_be_sent_back_to_it(scene):
    connection = scene.joins()
    connection.socket.setblocking(True)
    heard = bytearray()
    connection.socket.settimeout(3)
    while not heard:
        scene.turn(seconds=0.1)
        heard += connection.socket.recv(65536) if _has_input(connection.socket) else b""
    connection.socket.sendall(heard)
    scene.turn(lambda: not scene.server._joined)
    assert not scene.server._joined


def _has_input(peer: socket.socket) -> bool:
    peer.settimeout(0.01)
    try:
        return bool(peer.recv(1, socket.MSG_PEEK))
    except OSError:
        return False


@pytest.mark.parametrize(
    "changes",
    [
        {"nproc": 3_000_000},
        {"nproc": 0},
        {"nproc": True},
        {"node": None},
        {"node": "a\x1b[2J"},
        {"agent": "x" * 5000},
        {"protocol": "2"},
        {"type": "welcome"},
    ],
)
def test_a_member_that_makes_no_sense_is_dropped(scene, changes):
    connection = scene.member()
    connection.send({**scene.here.hello(), **HELLO, **changes})
    with pytest.raises(ConnectionLostError):
        scene.turn(lambda: connection.receive())
    assert not scene.server._joined
    scene.joins()


def test_only_members_are_told_why_they_are_refused(scene):
    refused = scene.member({**scene.here.hello(), **HELLO, "config": "other"})
    (message,) = refused.receive()
    assert f"the resolved config is other, but {CONFIG} here" in message["why"]


def test_a_member_of_another_version_is_told_so_even_if_its_hello_has_other_fields(scene):
    refused = scene.member({"type": "hello", "protocol": 3, "slots": [0, 1]})
    (message,) = refused.receive()
    assert "another ft_dist version" in message["why"]


def test_a_node_speaks_for_its_own_ranks_only(scene):
    connection = scene.joins()
    connection.send({"type": "ended", "round": 1, "rank": 0, "code": 2})
    connection.send({"type": "ended", "round": 2, "rank": 1, "code": 2})
    connection.send({"type": "ended", "round": 1, "rank": 77, "code": 2})
    scene.turn(seconds=0.3)
    assert set(scene.head._round.running) == {0, 1}
    scene.ends(connection, 0)


def test_an_agent_with_another_secret_says_what_to_do(scene, tmp_path, monkeypatch):
    for name in ("SECRET_TIMEOUT_S", "RETRY_S"):
        monkeypatch.setattr(rendezvous_module, name, 0.05)
    other = RunSecret(tmp_path / "elsewhere" / "launch" / "secret")
    other.create()
    wanted = r"refused our proof and .* `export FT_DIST_SECRET=\$\(openssl rand -hex 32\)`"
    with serving(scene):
        for secret, line in ((other, wanted), (RunSecret(tmp_path / "none"), "there is no secret yet")):
            with pytest.raises(UserError, match=line):
                connect(scene.here, HELLO, secret=secret, timeout_s=30, stop=lambda: False, say=print)


@contextlib.contextmanager
def serving(scene: Scene) -> Iterator[None]:
    """The head's loop in a thread."""
    over = threading.Event()
    thread = threading.Thread(target=lambda: scene.turn(over.is_set, 60))
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_the_secret_is_private_and_ends_with_the_head(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    scene = Scene(tmp_path)
    path = tmp_path / "run" / "launch" / "secret"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_text() == scene.secret.value != ""
    with scene.server:
        pass
    assert not (tmp_path / "run").exists()
