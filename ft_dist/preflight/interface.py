"""Chooses the network interface of the ranks, and checks that a configured one exists.

gloo uses the address of the host's name, which is 127.0.1.1 on many machines and a network address on others. So it
gets the interface that leads to rank 0, which on one machine is loopback: no rank is then reachable from outside. NCCL
gets loopback on one machine; on several it chooses well on its own and is only checked.
"""

import fcntl
import os
import socket
import struct

from ft_dist.errors import PreflightError

SIOCGIFADDR = 0x8915


def choose_interface(*, node: str, several_nodes: bool) -> None:
    """Set GLOO_SOCKET_IFNAME, and on one machine NCCL_SOCKET_IFNAME, unless they are set.

    Raises PreflightError if a configured interface does not exist.
    """
    names = [name for _, name in socket.if_nameindex()]
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        wanted = os.environ.get(variable, "")
        if wanted and not _found(wanted, names, exact=variable.startswith("GLOO")):
            raise PreflightError(
                f"{node}: {variable}={wanted} is not a network interface of this machine ({', '.join(names)}). "
                f"Name one that all nodes have, or unset it."
            )
    towards = address_towards(os.environ.get("MASTER_ADDR", "127.0.0.1"))
    chosen = interface_of(towards)
    here = towards.startswith("127.")
    if not chosen or not (several_nodes or here):
        return
    if not os.environ.get("GLOO_SOCKET_IFNAME"):
        os.environ["GLOO_SOCKET_IFNAME"] = chosen
    if here and not several_nodes:
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={chosen}")


def own_address() -> dict[str, str]:
    """`interface` and `address` that gloo uses."""
    name = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if name:
        return {"interface": name, "address": _address_of(name) or ""}
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        address = ""
    return {"interface": interface_of(address) or "", "address": address}


def address_towards(host: str) -> str:
    """The address from which this machine reaches `host`; sends nothing."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def interface_of(address: str) -> str | None:
    """The interface that has an IPv4 address."""
    return next((name for _, name in socket.if_nameindex() if address and _address_of(name) == address), None)


def _address_of(name: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        except OSError:
            return None
    return socket.inet_ntoa(answer[20:24])


def _found(wanted: str, names: list[str], *, exact: bool) -> bool:
    """NCCL reads `^` as "not", `=` as "exactly", and anything else as a prefix of a name."""
    if wanted.startswith("^"):
        return True
    exact = exact or wanted.startswith("=")
    parts = wanted.removeprefix("=").split(",")
    return any(name == part if exact else name.startswith(part) for part in parts for name in names)
