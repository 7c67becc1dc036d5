"""A stranger on the network of a run: `python -m tests.launcher.elastic.attack MARK [decoy]`, until it is killed.

It finds every port at which a process with the mark in its environment listens, as a scanner would, and sends each of
them garbage, deep JSON, forged messages, requests of torch's TCPStore, endless trickles, and connections by the
hundred. Prints as JSON what it heard from each port, at most once a second. As a decoy it keeps its machine just as
busy, but attacks ports of its own.
"""

import contextlib
import json
import os
import resource
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.launcher.processes import marked

MOST_OPEN = 1200
PER_PORT = 300
TRICKLE_S = 0.05
OWN_ADDRESS = "127.0.0.2"
HELLO = {"type": "hello", "protocol": 1, "node": "x", "nproc": 1, "agent": "x", "run_id": "", "code": "", "config": ""}


def tcp_store(operation: int, *fields: bytes) -> bytes:
    """A request to torch's TCPStore, after the number by which it knows its clients."""
    validate = struct.pack("<BI", 0, 0x3C85F7CE)
    return validate + bytes([operation]) + b"".join(struct.pack("<Q", len(field)) + field for field in fields)


FORGED = [
    b"[" * 200_000 + b"\n",
    json.dumps({**HELLO, "nproc": 3_000_000}).encode() + b"\n",
    json.dumps(HELLO).replace('"nproc": 1', '"nproc": 1e999').encode() + b"\n",
    json.dumps(HELLO).encode() + b'\n{"type": "ended", "round": 1, "rank": 0, "code": 2}\n',
    b'{"type": "hello"}\n',
    b"GET / HTTP/1.1\r\n\r\n",
    bytes(64),
    os.urandom(65536),
    tcp_store(1, b"checkpoint/1/1", b'{"error": "forged"}'),
    tcp_store(1, b"start 0/checkpoint/1/1", b'{"error": "forged"}'),
    tcp_store(1, b"ft_dist/stop", b"1"),
    tcp_store(8, b"0//cpu//0/0"),
]


def ports_of(mark: str) -> set[tuple[str, int]]:
    """Address and port of every listening TCP socket of the marked processes."""
    inodes = set()
    for pid in marked(mark):
        if pid == os.getpid():
            continue
        with contextlib.suppress(OSError):
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    inodes.add(os.readlink(descriptor))
    found = set()
    for family in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{family}").read_text().splitlines()[1:]:
            fields = line.split()
            address, _, port = fields[1].rpartition(":")
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                found.add((_address(address), int(port, 16)))
    return found


def _address(text: str) -> str:
    """The kernel writes 32-bit words in the order of this machine."""
    words = [struct.pack("=I", int(text[at : at + 8], 16)) for at in range(0, len(text), 8)]
    raw = b"".join(words)
    return socket.inet_ntop(socket.AF_INET if len(raw) == 4 else socket.AF_INET6, raw)


def reachable(address: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)


def own_ports(count: int) -> Callable[[], set[tuple[str, int]]]:
    listeners = [socket.create_server((OWN_ADDRESS, 0), backlog=1024) for _ in range(count)]
    return lambda: {listener.getsockname() for listener in listeners}


def attack(find: Callable[[], set[tuple[str, int]]]) -> Iterator[dict[str, object]]:
    """What it heard, once a second."""
    opened: list[tuple[int, socket.socket, list[bytes]]] = []
    heard: dict[str, bytes] = {}
    sent = 0
    reported = time.monotonic()
    while True:
        ports = find()
        for address, port in ports:
            for number in range(PER_PORT // 10):
                peer = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
                peer.setblocking(False)
                if peer.family == socket.AF_INET:  # its connections must not take ports that the run is about to choose
                    peer.bind((OWN_ADDRESS, 0))
                with contextlib.suppress(BlockingIOError):
                    peer.connect((reachable(address), port))
                # one in three only holds the connection; afterwards a line that never ends
                opened.append((port, peer, [b"x", FORGED[sent % len(FORGED)]] if number % 3 else [b"x"]))
                sent += 1
        for port, peer, messages in opened:
            with contextlib.suppress(OSError):
                peer.send(messages[-1])
                messages[1:] = []
            with contextlib.suppress(OSError):
                heard[str(port)] = heard.get(str(port), b"")[-4000:] + peer.recv(4096)
        while len(opened) > MOST_OPEN:
            opened.pop(0)[1].close()
        if time.monotonic() - reported > 1:
            reported = time.monotonic()
            yield {
                "ports": sorted(f"{address}:{port}" for address, port in ports),
                "sent": sent,
                "heard": {port: data.hex() for port, data in heard.items()},
            }
        time.sleep(TRICKLE_S)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1]),) * 2)
    mark, *decoy = sys.argv[1:]
    for report in attack(own_ports(6) if decoy else lambda: ports_of(mark)):
        print(json.dumps(report), flush=True)
