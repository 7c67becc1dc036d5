"""gloo's ports: ranks find each other, and nobody else gets a byte through."""

import os
import secrets
import socket
import struct
import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from ft_dist.network.gate import listen_at
from ft_dist.network.guard import DROP_ALL, DROP_DATA, SO_DETACH_FILTER, GuardedStore, attach, rank_info
from ft_dist.network.secret import new_secret
from ft_dist.network.store import StoreServer
from tests.conftest import ROOT
from tests.launcher.elastic.attack import ports_of
from tests.launcher.processes import end_all

KEY = "0//cpu//0/0"
RANK = """
import sys, time
from datetime import timedelta
import torch, torch.distributed as dist
from ft_dist.network.guard import GuardedStore

class Slow(GuardedStore):
    def set(self, key, value):
        super().set(key, value)
        if "//cpu//" in key:
            print("published", flush=True)
            time.sleep(1.5)  # for the strangers

rank, size, port = map(int, sys.argv[1:4])
store = Slow("127.0.0.1", port, sys.argv[4], timeout=timedelta(seconds=60))
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=20))
group = dist.new_group(list(range(size)))
for within in (None, group):
    tensor = torch.full((1000,), float(rank + 1))
    dist.all_reduce(tensor, group=within)
    assert tensor.eq(size * (size + 1) / 2).all(), tensor
dist.barrier()
print("formed", store.guarded, flush=True)
sys.stdin.read()
dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture
def store():
    secret = new_secret()
    server = StoreServer(listen_at("127.0.0.1", 0, several_nodes=False), secret)
    return GuardedStore("127.0.0.1", server.port, secret, timeout=timedelta(seconds=20))


def published(address: tuple[str, int], *, size: int = 2) -> bytes:
    """What gloo publishes for a rank."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    place = struct.pack("=H", family) + struct.pack(">H", address[1]) + bytes(4 if family == socket.AF_INET6 else 0)
    place = (place + socket.inet_pton(family, address[0])).ljust(128, b"\x7f") + b"\xff" * 8
    name = b"a.host"
    return struct.pack("=Q", len(name)) + name + struct.pack("=Q", len(place)) + place + bytes(8 * size)


@pytest.mark.parametrize("size", [2, 3])
def test_strangers_at_the_ports_cannot_take_the_place_of_a_rank(size):
    secret, mark = new_secret(), secrets.token_hex(8)
    server = StoreServer(listen_at("127.0.0.1", 0, several_nodes=False), secret)
    command = [sys.executable, "-c", RANK]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(size), str(server.port), secret],
            cwd=ROOT,
            env={**os.environ, "FT_DIST_TEST_RUN": mark, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    strangers = []
    try:
        assert all(rank.stdout.readline() == "published\n" for rank in ranks)
        for _ in range(10):
            for place in ports_of(mark):
                for number in range(size):  # what gloo expects from the ranks
                    stranger = socket.socket()
                    stranger.setblocking(False)
                    stranger.connect_ex(place)
                    strangers.append((stranger, struct.pack("=Q", number) + bytes(100)))
            time.sleep(0.05)
            for stranger, data in strangers:
                try:
                    stranger.send(data)
                except OSError:
                    continue
        assert all(rank.stdout.readline() == "published\n" for rank in ranks), "the second group"
        assert [rank.stdout.readline() for rank in ranks] == ["formed 2\n"] * size
        time.sleep(0.5)  # the listeners close a moment after the last rank has come
        places = ports_of(mark)
        assert len(places) == 2 * size
        for place in places:
            with pytest.raises(TimeoutError):
                socket.create_connection(place, timeout=0.3)
        for rank in ranks:
            rank.stdin.close()
        assert [rank.wait(timeout=60) for rank in ranks] == [0] * size
    finally:
        end_all(mark)
        for stranger, _ in strangers:
            stranger.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_filter_drops_data_until_it_is_detached(host):
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        attach(listener, DROP_DATA)
        with socket.create_connection(listener.getsockname()[:2]) as member:
            connection, _ = listener.accept()
            member.send(b"number")
            connection.settimeout(0.3)
            with pytest.raises(TimeoutError):
                connection.recv(10)
            connection.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)
            connection.settimeout(10)
            assert connection.recv(10) == b"number"
            attach(listener, DROP_ALL)
            with pytest.raises(TimeoutError):
                socket.create_connection(listener.getsockname()[:2], timeout=0.3)
            member.send(b"more")
            assert connection.recv(10) == b"more"
            connection.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_whoever_connects_before_the_guard_stops_the_start(store, host):
    """A restart is harmless; a stranger in a collective is not."""
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        address = listener.getsockname()[:2]
        assert rank_info(published(address)) == (address, 2)
        with (
            socket.create_connection(address),
            pytest.raises(dist.DistNetworkError, match="before that port was guarded"),
        ):
            store.set(KEY, published(address))


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"elsewhere", "gloo publishes its address in a form that we do not know"),
        (published(("127.0.0.1", 9)), "gloo does not listen at 127.0.0.1:9, as it says"),
        (published(("127.0.0.1", 9), size=65), "while 65 ranks look for each other"),
    ],
    ids=["form", "listener", "ranks"],
)
def test_what_is_not_guarded_is_named(store, capsys, value, reason):
    store.set(KEY, value)
    assert "open to strangers" in (said := capsys.readouterr().err)
    assert reason in said
    assert store.get(KEY) == value
    assert store.guarded == 0
