"""The ranks' store: members share it, strangers do not get in."""

import os
import subprocess
import sys
import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from ft_dist.errors import UserError
from ft_dist.network.gate import listen_at
from ft_dist.network.open import open_store
from ft_dist.network.secret import VARIABLE, RunSecret, new_secret
from ft_dist.network.store import RunStore, StoreServer
from tests.conftest import ROOT
from tests.ports import free_port

SOON = timedelta(seconds=1)


@pytest.fixture
def served():
    secret = new_secret()
    server = StoreServer(listen_at("127.0.0.1", 0, several_nodes=False), secret)
    return server, RunStore("127.0.0.1", server.port, secret, timeout=timedelta(seconds=20)), secret


def test_torch_uses_it_as_its_own(served):
    _, store, _ = served
    view = dist.PrefixStore("a", store)
    view.set("key", "value")
    assert view.get("key") == b"value"
    assert view.add("count", 2) + view.add("count", 3) == 7
    assert view.check(["key", "count"])
    assert not view.check(["key", "other"])
    assert view.compare_set("once", "", "first") == view.compare_set("once", "", "second") == b"first"
    assert view.delete_key("key")
    assert not view.delete_key("key")
    assert view.num_keys() == 2
    view.set("large", b"x" * 3_000_000)
    assert len(view.clone().get("large")) == 3_000_000
    with pytest.raises(dist.DistStoreError):
        view.wait(["never"], timedelta(seconds=0.1))
    threading.Timer(0.2, lambda: view.clone().set("late", "now")).start()
    assert view.get("late") == b"now"


def test_a_stranger_cannot_read_write_or_delete(served):
    """One that speaks the protocol of torch's store, and one that speaks ours with another secret."""
    server, store, _ = served
    store.set("checkpoint/1/1", '{"name": "rank-1"}')
    forge = (
        "import sys, torch.distributed as dist; from datetime import timedelta\n"
        "store = dist.TCPStore('127.0.0.1', int(sys.argv[1]), 2, is_master=False, timeout=timedelta(seconds=2))\n"
        "store.set('checkpoint/1/1', 'forged'); print(store.get('checkpoint/1/1'))"
    )
    forged = subprocess.run(
        [sys.executable, "-c", forge, str(server.port)], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert forged.returncode != 0, forged.stdout
    with pytest.raises(dist.DistNetworkError, match="refused our proof"):
        RunStore("127.0.0.1", server.port, new_secret(), timeout=SOON)
    assert store.get("checkpoint/1/1") == b'{"name": "rank-1"}'


def test_a_member_that_makes_no_sense_loses_its_connection_only(served):
    server, store, secret = served
    other = RunStore("127.0.0.1", server.port, secret, timeout=SOON)
    store.set("word", "x")
    with pytest.raises(dist.DistNetworkError):
        other.add("word", 1)
    assert store.get("word") == b"x"


@pytest.mark.parametrize("secret", ["", "s" * 40])
def test_the_port_of_rank_0_listens_on_loopback_for_one_machine(monkeypatch, secret):
    port = free_port()
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), VARIABLE: secret}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    store = open_store(timeout_s=10)
    store.set("a", "b")
    with open("/proc/net/tcp") as file:
        listening = [line.split()[1] for line in file if line.split()[3] == "0A"]
    assert f"0100007F:{port:04X}" in listening
    assert f"00000000:{port:04X}" not in listening


def test_a_world_of_one_opens_no_port(monkeypatch):
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert isinstance(open_store(timeout_s=1), dist.HashStore)


def test_a_short_secret_is_refused_and_not_shown(monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, "hunter2")
    with pytest.raises(UserError, match="has 7 characters; at least 32") as refused:
        RunSecret(tmp_path / "secret")
    assert "hunter2" not in str(refused.value)


def test_under_torchrun_our_posts_are_signed_if_there_is_a_secret(tmp_path):
    """Two ranks meet in our store, although torchrun hosts torch's own."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import sys\n"
        "from ft_dist.distributed import control_store, join_world, leave_world\n"
        "from ft_dist.network.open import open_store\n"
        "store = open_store(timeout_s=60); world = join_world(store, timeout_s=60)\n"
        "control_store().set(f'rank{world.rank}', 'x'); control_store().get(f'rank{1 - world.rank}')\n"
        "open(f'{sys.argv[1]}/{world.rank}', 'w').write(type(store).__name__); control_store().add('done', 1)\n"
        "while control_store().add('done', 0) < 2: pass\n"
        "leave_world()\n"
    )
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), str(tmp_path)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, *command],
        env=os.environ | {"PYTHONPATH": paths, VARIABLE: "s" * 40},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["GuardedStore", "GuardedStore"]
