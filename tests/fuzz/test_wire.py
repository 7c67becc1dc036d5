"""What arrives at a run's ports: bytes of strangers, and messages of members that lie. Only their connection ends."""

import contextlib
import json
import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ft_dist.launcher.elastic.head import Head, Node
from ft_dist.launcher.elastic.messages import FROM_HEAD, FROM_NODES
from ft_dist.launcher.elastic.rendezvous import Rendezvous, RendezvousServer
from ft_dist.launcher.elastic.restarts import RestartPolicy
from ft_dist.launcher.elastic.wire import Connection
from ft_dist.network.channel import Channel, ConnectionLostError
from ft_dist.network.gate import Gate
from ft_dist.network.secret import RunSecret
from ft_dist.network.store import _pack, _unpack
from tests.fuzz.bounds import outcome

SECRET = "s" * 64
LONGEST = 2**16

blobs = st.binary(max_size=300) | st.integers(0, 5000).map(bytes)
numbers = st.integers() | st.floats() | st.sampled_from([2**31, 2**63, -1, 10**400, 1e308])
values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
messages = st.sampled_from(
    [
        {"type": "ended", "round": 1, "rank": 1, "code": 2},
        {"type": "ended", "round": 1, "rank": 0, "code": 2},
        {"type": "leaving", "number": 15},
        {
            "type": "hello",
            "protocol": 2,
            "run_id": "r",
            "code": "c",
            "config": "d",
            "node": "n",
            "nproc": 1,
            "agent": "a",
        },
        {"type": "over", "code": 2, "why": ""},
    ]
)
odd_texts = st.sampled_from(["[", '{"a":', "\\", "1", '"']).map(lambda part: (part * 10_000).encode()[:30_000])


@st.composite
def lies(draw: st.DrawFn) -> bytes:
    """The text of a message with some of its values, keys or bytes changed."""
    message: dict[str, Any] = dict(draw(messages))
    for key in draw(st.lists(st.sampled_from(sorted(message)), max_size=2)):
        message[key] = draw(values)
    if draw(st.booleans()):
        message.pop(draw(st.sampled_from(sorted(message))))
    text = bytearray(json.dumps(message).encode())
    for place, bit in draw(st.lists(st.tuples(st.integers(0, len(text) - 1), st.integers(0, 7)), max_size=2)):
        text[place] ^= 1 << bit
    return bytes(text[: draw(st.integers(0, len(text)))]) if draw(st.booleans()) else bytes(text)


@contextlib.contextmanager
def pair(listener: socket.socket) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a connection, which leaves no state in the system afterwards."""
    near = socket.create_connection(listener.getsockname())
    far, _ = listener.accept()
    try:
        yield near, far
    finally:
        for end in (near, far):
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            end.close()


@pytest.fixture(scope="module")
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def heard(channel: Channel) -> list[bytes]:
    """All messages until nothing more arrives or the connection ends."""
    found: list[bytes] = []
    with contextlib.suppress(ConnectionLostError):
        for _ in range(20):
            found += channel.receive()
    return found


@given(data=blobs)
def test_bytes_before_the_proof(listener, data):
    def server() -> Channel:
        with pair(listener) as (near, far):
            channel = Channel(far, SECRET, purpose="x", serves=True, longest=LONGEST)
            near.sendall(data)
            assert heard(channel) == []
            return channel

    def client() -> Channel:
        with pair(listener) as (near, far):
            channel = Channel(near, SECRET, purpose="x", serves=False, longest=LONGEST)
            far.sendall(data)
            assert heard(channel) == []
            return channel

    assert not outcome(server).ready
    assert not outcome(client).ready


@given(
    payloads=st.lists(st.binary(max_size=50), min_size=1, max_size=4),
    place=st.integers(0, 10_000),
    flip=st.integers(0, 255),
    cut=st.integers(0, 10_000),
    extra=blobs,
)
def test_bytes_after_the_proof(listener, payloads, place, flip, cut, extra):
    """Of a damaged stream, the messages before the damage arrive, and nothing else."""

    def read() -> None:
        with pair(listener) as (near, far):
            server = Channel(far, SECRET, purpose="x", serves=True, longest=LONGEST)
            client = Channel(near, SECRET, purpose="x", serves=False, longest=LONGEST)
            for _ in range(1000):
                if server.ready and client.ready:
                    break
                for channel in (server, client):
                    assert channel.receive() == []
            sent = bytearray()
            client._flush = lambda: None  # type: ignore[method-assign]
            for payload in payloads:
                client.send(payload)
            sent = client._unsent
            sent[place % len(sent)] ^= flip
            near.setblocking(True)
            near.sendall(bytes(sent[: cut % (len(sent) + 1)] if cut % 3 == 0 else sent) + extra)
            found = heard(server)
            assert found == payloads[: len(found)]

    outcome(read)


class Scene:
    """A head with two nodes, of which the second is about to lie."""

    def __init__(self, folder, port: socket.socket) -> None:
        here = Rendezvous("127.0.0.1", 1, "r", "c", "d")
        gate = Gate(port, SECRET, purpose="x", longest=LONGEST)
        self.server = RendezvousServer(gate, here, RunSecret(folder / "s"))
        self.head = Head(
            minimum=2,
            maximum=2,
            policy=RestartPolicy(3, folder),
            run_dir=folder,
            grows_at_commits=True,
            join_timeout_s=60.0,
            master=lambda: ("127.0.0.1", 1),
            say=lambda line: None,
        )
        self.head.join(Node("first", 1, lambda message: None))


@given(texts=st.lists(lies() | odd_texts, min_size=1, max_size=4), joined=st.booleans())
def test_messages_of_a_member_that_lies(listener, tmp_path_factory, texts, joined):
    folder = tmp_path_factory.getbasetemp()

    def serve() -> None:
        with socket.create_server(("127.0.0.1", 0)) as port, pair(listener) as (near, far):
            scene = Scene(folder, port)
            server = Channel(far, SECRET, purpose="x", serves=True, longest=LONGEST)
            client = Channel(near, SECRET, purpose="x", serves=False, longest=LONGEST)
            while not (server.ready and client.ready):
                for channel in (server, client):
                    assert channel.receive() == []
            connection = Connection(server, FROM_NODES)
            if joined:
                node = Node("second", 1, connection.send)
                scene.server._joined[connection] = node, "agent"
                scene.head.join(node)
                scene.head.tick()
            else:
                scene.server._unnamed[connection] = 1e12
            for text in texts:
                client.send(text)
            near.shutdown(socket.SHUT_WR)
            for _ in range(3):
                scene.server.serve(scene.head)
                scene.head.tick()
            # the ranks of the first node are its own business
            assert scene.head.over is None
            assert not joined or 0 in scene.head._round.running
            Connection(client, FROM_HEAD).close()
            scene.server._gate.close()

    outcome(serve)


@given(fields=st.lists(blobs, max_size=4), noise=blobs)
def test_requests_to_the_store(fields, noise):
    from ft_dist.network.store import StoreServer

    server = StoreServer.__new__(StoreServer)
    server._values = {b"key": b"value", b"number": b"7"}

    def answer(message: bytes) -> None:
        with contextlib.suppress(ValueError, struct.error):
            operation, *rest = _unpack(message)
            server._answer(operation, rest)

    assert _unpack(_pack(*fields)) == fields
    for operation in b"SGACXDNPW":
        for rest in (fields, [b"key", *fields], [b"number", *fields]):
            outcome(lambda operation=operation, rest=rest: answer(_pack(bytes([operation]), *rest)))
    outcome(lambda: answer(noise))
