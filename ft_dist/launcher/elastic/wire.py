"""JSON messages over an authenticated connection; each is checked against its schema before it counts.

Each side sends a heartbeat, an empty message, every BEAT_S. A peer that is silent for LOST_S counts as lost, whether
its process, machine or link failed. A stall of a few seconds is not a loss, since TCP resends.
"""

import json
import socket
import time
from typing import Any

from ft_dist.errors import UserError
from ft_dist.launcher.elastic.messages import Schemas
from ft_dist.network.channel import Channel, ConnectionLostError
from ft_dist.outside import parse_object, validated

Message = dict[str, Any]

PURPOSE = "rendezvous"
PROTOCOL = 2
"""Raised when messages change. `refused`, and `type` and `protocol` of `hello`, stay as they are."""
LONGEST_MESSAGE_BYTES = 2**16
BEAT_S = 1.0
LOST_S = 15.0


class OtherProtocolError(ConnectionLostError):
    """The peer says hello in another version of the protocol."""


class Connection:
    def __init__(self, channel: Channel, incoming: Schemas) -> None:
        """`incoming`: the messages that the peer may send."""
        self.channel = channel
        self._incoming = incoming
        self._put_back: list[Message] = []
        self._silent_s = 0.0
        self._bytes_read = 0
        self._checked_at = self._beat_at = time.monotonic()

    @property
    def socket(self) -> socket.socket:
        return self.channel.socket

    def send(self, message: Message) -> None:
        """Queue `message`; what cannot be sent now is sent by the next `receive`."""
        self.channel.send(json.dumps(message).encode())

    def unread(self, messages: list[Message]) -> None:
        """Put messages back: the next `receive` returns them first."""
        self._put_back = messages

    def receive(self) -> list[Message]:
        """Messages received since the last call. Raises ConnectionLostError, but only after returning all messages."""
        if self._put_back:
            put_back, self._put_back = self._put_back, []
            return put_back
        self._beat()
        payloads = self.channel.receive()
        if self.channel.bytes_read > self._bytes_read:
            self._bytes_read, self._silent_s = self.channel.bytes_read, 0.0
        elif self._silent_s > LOST_S:
            raise ConnectionLostError(f"it was silent for {self._silent_s:.0f} s")
        return [self._parse(payload) for payload in payloads if payload]

    def finish(self, timeout_s: float = 3.0) -> None:
        """Send what is queued, wait for the peer to close, and close."""
        self.channel.finish(timeout_s)

    def close(self) -> None:
        self.channel.close()

    def _parse(self, payload: bytes) -> Message:
        try:
            tree = parse_object(payload, where="its message", error=UserError)
            protocol = tree.get("protocol", PROTOCOL)
            if isinstance(protocol, int) and protocol != PROTOCOL:
                raise OtherProtocolError("it runs another ft_dist version")
            schema = self._incoming.get(str(tree.get("type")))
            if schema is None:
                raise UserError("its message: has no type that is expected here.")
            return validated(tree, schema, where="its message", error=UserError).model_dump()
        except UserError as error:
            raise ConnectionLostError(f"it does not keep to the protocol of ft-dist: {error}") from None

    def _beat(self) -> None:
        now = time.monotonic()
        # time during which this process was stopped is not silence of the peer
        self._silent_s += min(now - self._checked_at, BEAT_S)
        self._checked_at = now
        if now - self._beat_at >= BEAT_S:
            self._beat_at = now
            self.channel.send(b"")
