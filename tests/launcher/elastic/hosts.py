"""Several hosts on one machine: network namespaces on a bridge whose links can be cut or slowed down. Root only.

Not every kernel has netem, so a slow link is a process that forwards frames between two interfaces after DELAY_S:
`python -m tests.launcher.elastic.hosts IN OUT DELAY_S`. Stopping it (SIGSTOP) stalls the link.
"""

import ctypes
import fcntl
import heapq
import os
import secrets
import select
import shutil
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

ETH_P_ALL = 3
PACKET_OUTGOING = 4
SIOCETHTOOL = 0x8946
OFFLOADS = (0x17, 0x19, 0x1F, 0x25)
"""ETHTOOL_STXCSUM, SSG, STSO, SGSO: off, so that frames have checksums and sizes as on a wire"""


def usable() -> bool:
    """True if this machine lets us create network namespaces."""
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        return False
    name = f"try-{secrets.token_hex(3)}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return tried.returncode == 0


class Hosts:
    """`count` hosts, host1 .. hostN at `address(1)` ..; all are removed when the block ends."""

    def __init__(self, count: int) -> None:
        self._prefix = f"ft{secrets.token_hex(2)}"
        self._count = count
        self._relay: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Hosts":
        net = self._net
        _ip("netns", "add", net)
        _ip("-n", net, "link", "add", "br0", "type", "bridge", "forward_delay", "0")
        _ip("-n", net, "link", "set", "br0", "up")
        names = "".join(f"{self.address(number)} host{number}\n" for number in range(1, self._count + 1))
        for number in range(1, self._count + 1):
            host = self._name(number)
            _ip("netns", "add", host)
            folder = Path("/etc/netns") / host
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
            (folder / "nsswitch.conf").write_text("hosts: files\n")
            _ip("-n", net, "link", "add", f"v{number}", "type", "veth", "peer", "name", "eth0", "netns", host)
            _ip("-n", net, "link", "set", f"v{number}", "master", "br0", "up")
            _ip("-n", host, "link", "set", "lo", "up")
            _ip("-n", host, "link", "set", "eth0", "up")
            _ip("-n", host, "address", "add", f"{self.address(number)}/24", "dev", "eth0")
        return self

    def __exit__(self, *_: object) -> None:
        if self._relay:
            self._relay.kill()
            self._relay.wait()
        for name in (self._net, *(self._name(number) for number in range(1, self._count + 1))):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)

    def address(self, number: int) -> str:
        return f"10.77.0.{10 + number}"

    def start(self, number: int, *arguments: str, **environment: str) -> "subprocess.Popen[str]":
        """Start `python ARGUMENTS` on a host; the returned process is Python itself."""
        inside = ["ip", "netns", "exec", self._name(number), "unshare", "-u", "/bin/sh", "-c"]
        script = f'hostname host{number}; exec "$@"'
        return subprocess.Popen(
            [*inside, script, "sh", sys.executable, *arguments],
            cwd=ROOT,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def cut(self, number: int) -> None:
        _ip("-n", self._net, "link", "set", f"v{number}", "down")

    def repair(self, number: int) -> None:
        _ip("-n", self._net, "link", "set", f"v{number}", "up")

    def slow_down(self, number: int, delay_s: float) -> "subprocess.Popen[bytes]":
        """Delay the link of a host by `delay_s` each way; stopping the returned process stalls the link."""
        net, host = self._net, self._name(number)
        _ip("-n", net, "link", "set", f"v{number}", "nomaster")
        _ip("-n", net, "link", "add", "in", "type", "veth", "peer", "name", "out")
        _ip("-n", net, "link", "set", "in", "master", "br0", "up")
        _ip("-n", net, "link", "set", "out", "up")
        for name, interface in ((net, "in"), (host, "eth0")):
            subprocess.run(
                ["ip", "netns", "exec", name, sys.executable, "-m", "tests.launcher.elastic.hosts", interface],
                cwd=ROOT,
                check=True,
            )
        relay = [sys.executable, "-m", "tests.launcher.elastic.hosts", f"v{number}", "out", str(delay_s)]
        self._relay = subprocess.Popen(["ip", "netns", "exec", net, *relay], cwd=ROOT)
        return self._relay

    @property
    def _net(self) -> str:
        return f"{self._prefix}-net"

    def _name(self, number: int) -> str:
        return f"{self._prefix}-h{number}"


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def disable_offloads(interface: str) -> None:
    with socket.socket() as probe:
        for command in OFFLOADS:
            value = ctypes.create_string_buffer(struct.pack("II", command, 0))
            request = struct.pack("16sP", interface.encode(), ctypes.addressof(value))
            try:
                fcntl.ioctl(probe, SIOCETHTOOL, request)
            except OSError as error:
                print(f"{interface}: {command:#x}: {error}", file=sys.stderr)


def relay(first: str, second: str, delay_s: float) -> None:
    """Forward frames between two interfaces forever."""
    ends = [socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) for _ in range(2)]
    for end, name in zip(ends, (first, second), strict=True):
        end.bind((name, 0))
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**23)
    others = {ends[0]: ends[1], ends[1]: ends[0]}
    waiting: list[tuple[float, int, Any, bytes]] = []
    count = 0
    while True:
        pause_s = max(0.0, waiting[0][0] - time.monotonic()) if waiting else 1.0
        for end in select.select(ends, [], [], pause_s)[0]:
            frame, address = end.recvfrom(70000)
            if address[2] != PACKET_OUTGOING:
                count += 1
                heapq.heappush(waiting, (time.monotonic() + delay_s, count, others[end], frame))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, end, frame = heapq.heappop(waiting)
            end.send(frame)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        disable_offloads(sys.argv[1])
    else:
        relay(sys.argv[1], sys.argv[2], float(sys.argv[3]))
