"""JSON objects, a line each, over a TCP connection that never makes its user wait.

Both sides say something every BEAT_S; one that is silent for LOST_S is gone, whether its process, its machine or the
way to it. A stall of some seconds is none: TCP repeats what was lost. Nothing received is executed.
"""

import contextlib
import json
import socket
import time
from typing import Any

Message = dict[str, Any]

BEAT_S = 1.0
LOST_S = 15.0
LONGEST_LINE_BYTES = 2**20


class ConnectionLostError(Exception):
    """The other side is gone, silent, or does not speak our language."""


class Connection:
    def __init__(self, peer: socket.socket) -> None:
        peer.setblocking(False)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = peer
        self._unread: list[Message] = []
        self._received = b""
        self._to_send = b""
        self._silent_s = 0.0
        self._looked_at = self._beat_at = time.monotonic()

    def send(self, message: Message) -> None:
        """Queue `message`; what does not go out now goes with the next `receive`."""
        self._to_send += json.dumps(message).encode() + b"\n"
        with contextlib.suppress(ConnectionLostError):
            self._flush()

    def give_back(self, messages: list[Message]) -> None:
        """The next `receive` returns these first."""
        self._unread = messages

    def receive(self) -> list[Message]:
        """What has arrived since the last call. Raises ConnectionLostError; what came before it is returned first."""
        problem = None
        for part in (self._beat, self._read):
            try:
                part()
            except ConnectionLostError as error:
                problem = problem or error
        *lines, self._received = self._received.split(b"\n")
        if problem and not lines:
            raise problem
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            messages = [None]
        if not all(isinstance(message, dict) for message in messages) or len(self._received) > LONGEST_LINE_BYTES:
            raise ConnectionLostError("it does not speak ft-dist's language; another program may listen there")
        if self._silent_s > LOST_S:
            raise ConnectionLostError(f"nothing was heard for {self._silent_s:.0f} s")
        unread, self._unread = self._unread, []
        return [*unread, *(message for message in messages if message.get("type") != "beat")]

    def finish(self, timeout_s: float = 3.0) -> None:
        """Send what is queued, let the other side close first (a close with unread data would destroy it), close."""
        deadline = time.monotonic() + timeout_s
        with contextlib.suppress(OSError, ConnectionLostError):
            while self._to_send and time.monotonic() < deadline:
                self._flush()
                time.sleep(0.01)
            self.socket.shutdown(socket.SHUT_WR)
            while time.monotonic() < deadline:
                self._read()
                time.sleep(0.01)
        self.close()

    def close(self) -> None:
        self.socket.close()

    def _beat(self) -> None:
        now = time.monotonic()
        # time in which this process itself stood still says nothing about the other side
        self._silent_s += min(now - self._looked_at, BEAT_S)
        self._looked_at = now
        if now - self._beat_at >= BEAT_S:
            self._beat_at = now
            self._to_send += b'{"type": "beat"}\n'
        self._flush()

    def _read(self) -> None:
        while True:
            try:
                data = self.socket.recv(65536)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                raise ConnectionLostError(error.strerror or str(error)) from None
            if not data:
                raise ConnectionLostError("the connection was closed")
            self._silent_s = 0.0
            self._received += data

    def _flush(self) -> None:
        try:
            while self._to_send:
                sent = self.socket.send(self._to_send)
                self._to_send = self._to_send[sent:]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            raise ConnectionLostError(error.strerror or str(error)) from None
