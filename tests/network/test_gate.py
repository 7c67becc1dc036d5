"""The gate that members of a run pass. Strangers at it: tests/launcher/elastic/test_strangers.py."""

import socket
import threading
import time

from ft_dist.network import gate as gate_module
from ft_dist.network.channel import Channel
from ft_dist.network.gate import Gate, listen_at
from ft_dist.network.secret import new_secret

ENDS = {"purpose": "test", "longest": 1000}


def test_a_member_may_answer_before_the_gate_looks_again(monkeypatch):
    """Its proof can arrive between the gate's nonce and the first read."""

    class Slow(Channel):
        def _read(self) -> None:
            if not self.ready:
                time.sleep(0.3)
            super()._read()

    monkeypatch.setattr(gate_module, "Channel", Slow)
    secret = new_secret()
    listener = listen_at("127.0.0.1", 0, several_nodes=False)
    member = Channel(socket.create_connection(listener.getsockname()), secret, serves=False, **ENDS)

    def join() -> None:
        while not member.ready:
            member.receive()
            time.sleep(0.01)
        member.send(b"hello")

    threading.Thread(target=join, daemon=True).start()
    gate = Gate(listener, secret, **ENDS)
    try:
        (admitted,) = gate.admit()
        deadline = time.monotonic() + 10
        while not (messages := admitted.receive()) and time.monotonic() < deadline:
            gate.wait(0.1)
        assert messages == [b"hello"]
    finally:
        gate.close()
        member.close()
