"""JSON objects, one per line, over a non-blocking TCP connection.

Each side sends a heartbeat every BEAT_S. A peer that is silent for LOST_S counts as lost, whether its process, machine
or link failed. A stall of a few seconds is not a loss, since TCP resends. Nothing received is executed.
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
    """The peer is gone or silent, or it violates the protocol."""


class Connection:
    def __init__(self, peer: socket.socket) -> None:
        peer.setblocking(False)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = peer
        self._put_back: list[Message] = []
        self._received = b""
        self._to_send = b""
        self._silent_s = 0.0
        self._checked_at = self._beat_at = time.monotonic()

    def send(self, message: Message) -> None:
        """Queue `message`; what cannot be sent now is sent by the next `receive`."""
        self._to_send += json.dumps(message).encode() + b"\n"
        with contextlib.suppress(ConnectionLostError):
            self._flush()

    def unread(self, messages: list[Message]) -> None:
        """Put messages back: the next `receive` returns them first."""
        self._put_back = messages

    def receive(self) -> list[Message]:
        """Messages received since the last call. Raises ConnectionLostError, but only after returning all messages."""
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
            raise ConnectionLostError("it does not speak the protocol of ft-dist; another program may be listening")
        if self._silent_s > LOST_S:
            raise ConnectionLostError(f"it was silent for {self._silent_s:.0f} s")
        put_back, self._put_back = self._put_back, []
        return [*put_back, *(message for message in messages if message.get("type") != "beat")]

    def finish(self, timeout_s: float = 3.0) -> None:
        """Send what is queued, wait for the peer to close (closing with unread data would discard it), and close."""
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
        # time during which this process was stopped is not silence of the peer
        self._silent_s += min(now - self._checked_at, BEAT_S)
        self._checked_at = now
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
