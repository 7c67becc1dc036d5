"""TCP ports of this machine for tests."""

import socket


def free_port() -> int:
    """A port on loopback that is not in use."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
