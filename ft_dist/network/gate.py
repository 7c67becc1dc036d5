"""A listening port that only members of the run get through, and at which strangers cost next to nothing.

At most MOST_STRANGERS connections may be unproven, each for PROOF_TIMEOUT_S and 64 bytes; the oldest makes room for a
new one. Strangers get BUDGET_S for every REST_S, ten times as much while members join; members are served first. A
stranger is never sent anything but random bytes: who fails to prove is disconnected without a word.
"""

import contextlib
import errno
import ipaddress
import selectors
import socket
import time

from ft_dist.network.channel import Channel, ConnectionLostError

MOST_STRANGERS = 64
PROOF_TIMEOUT_S = 10.0
BUDGET_S, JOINING_BUDGET_S, REST_S = 0.0005, 0.005, 0.02
JOINING_S = 15.0
"""How long the larger budget counts at the start, and after each member that has joined: they come together"""
EXHAUSTED_REST_S = 1.0
"""How long to leave the listener alone when the system has no more descriptors or memory"""
BACKLOG = 1024
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


def listen_at(host: str, port: int, *, several_nodes: bool) -> socket.socket:
    """A socket that listens on the interface of `host` alone. Raises OSError, also if `host` is another machine.

    With `several_nodes`, a name may mean another address of this machine elsewhere (on Debian it is 127.0.1.1 here), so
    then it listens on all interfaces.
    """
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    if several_nodes and host != "localhost" and not _is_address(host):
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((address[0], 0))
        address = ("", port)
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


class Gate:
    """Accepts connections, and hands out those whose peers prove that they know the secret."""

    def __init__(self, listener: socket.socket, secret: str, *, purpose: str, longest: int) -> None:
        listener.setblocking(False)
        self._listener = listener
        self._secret, self._purpose, self._longest = secret, purpose, longest
        self._strangers: dict[Channel, float] = {}
        """Oldest first, with the time at which each came"""
        self._outside = selectors.DefaultSelector()
        self._outside.register(listener, selectors.EVENT_READ)
        self._inside = selectors.DefaultSelector()
        self._rest_until = 0.0
        self._joining_until = time.monotonic() + JOINING_S
        self._watched = False
        self._watch_outside(True)

    def wait(self, timeout_s: float) -> list[Channel]:
        """Wait until there is something to do; returns the members that have sent something."""
        now = time.monotonic()
        if now >= self._rest_until:
            self._watch_outside(True)
        else:
            timeout_s = min(timeout_s, self._rest_until - now)
        return [key.data for key, _ in self._inside.select(timeout_s) if key.data]

    def admit(self) -> list[Channel]:
        """Spend the budget on strangers; returns those that have become members."""
        now = time.monotonic()
        for channel, since in list(self._strangers.items()):
            if now - since <= PROOF_TIMEOUT_S:
                break
            self._turn_away(channel)
        if now < self._rest_until:
            return []
        admitted = []
        deadline = now + (JOINING_BUDGET_S if now < self._joining_until else BUDGET_S)
        # those that have begun come first, since they may be members
        for key, _ in sorted(self._outside.select(0), key=lambda event: event[0].data is None):
            if key.data is None:
                admitted += self._accept(deadline)
            elif self._hear(key.data):
                admitted.append(key.data)
            if time.monotonic() > deadline:
                self._rest(REST_S)
                break
        return admitted

    def drop(self, channel: Channel) -> None:
        """Close the connection of a member."""
        self.leave(channel)
        channel.close()

    def leave(self, channel: Channel) -> None:
        """Stop watching a member whose connection the caller closes itself."""
        with contextlib.suppress(KeyError, ValueError):
            self._inside.unregister(channel.socket)

    def close(self) -> None:
        """Close the port and the connections of strangers; those of members are the caller's."""
        for channel in list(self._strangers):
            self._turn_away(channel)
        self._inside.close()
        self._outside.close()
        self._listener.close()

    def _accept(self, deadline: float) -> list[Channel]:
        """Returns those that have already become members."""
        admitted: list[Channel] = []
        while time.monotonic() < deadline:
            try:
                peer, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError):
                break
            except OSError as error:
                if error.errno not in EXHAUSTED:
                    continue  # that connection failed before it was accepted
                if self._strangers:
                    self._turn_away(next(iter(self._strangers)))
                self._rest(EXHAUSTED_REST_S)
                break
            try:
                channel = Channel(peer, self._secret, purpose=self._purpose, serves=True, longest=self._longest)
            except OSError:
                peer.close()
                continue
            self._strangers[channel] = time.monotonic()
            self._outside.register(peer, selectors.EVENT_READ, channel)
            if self._hear(channel):  # sends it our nonce, and it may answer at once
                admitted.append(channel)
            if len(self._strangers) > MOST_STRANGERS:
                self._turn_away(next(iter(self._strangers)))
        return admitted

    def _hear(self, channel: Channel) -> bool:
        """True if the stranger has just proved that it is a member."""
        try:
            channel.receive()
        except ConnectionLostError:
            self._turn_away(channel)
            return False
        if not channel.ready:
            return False
        self._outside.unregister(channel.socket)
        del self._strangers[channel]
        self._inside.register(channel.socket, selectors.EVENT_READ, channel)
        self._joining_until = time.monotonic() + JOINING_S
        return True

    def _turn_away(self, channel: Channel) -> None:
        if channel in self._strangers:
            del self._strangers[channel]
            self._outside.unregister(channel.socket)
            channel.close()

    def _rest(self, seconds: float) -> None:
        self._rest_until = time.monotonic() + seconds
        self._watch_outside(False)

    def _watch_outside(self, watch: bool) -> None:
        """Whether strangers end `wait` early."""
        if watch and not self._watched:
            self._inside.register(self._outside.fileno(), selectors.EVENT_READ)
        elif self._watched and not watch:
            self._inside.unregister(self._outside.fileno())
        self._watched = watch


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
