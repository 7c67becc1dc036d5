"""An agent that looks for the head."""

import socket
from functools import partial

from ft_dist.launcher.elastic.rendezvous import Rendezvous, connect
from ft_dist.network.secret import RunSecret
from tests.ports import free_port


def test_a_connection_to_itself_is_not_the_head(monkeypatch, tmp_path):
    """TCP connects a socket to itself if the system picks the port that it looks for as its own."""
    port = free_port()
    own_port = partial(socket.create_connection, source_address=("127.0.0.1", port))
    monkeypatch.setattr("ft_dist.launcher.elastic.rendezvous.socket.create_connection", own_port)
    said: list[str] = []
    here = Rendezvous("127.0.0.1", port, "run", "code", "config")
    secret = RunSecret(tmp_path / "secret")
    assert connect(here, {"node": "a"}, secret=secret, timeout_s=0.3, stop=lambda: False, say=said.append) is None
    assert "could not reach the head" in said[-1]
