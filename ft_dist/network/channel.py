"""Messages over a non-blocking TCP connection whose two ends prove that they know the run's secret.

The server sends 32 random bytes; the client answers with 32 of its own and a proof, the HMAC-SHA256 of both under the
secret; the server proves the same. Until then no byte has a meaning, so there is nothing to parse and nothing to learn.
Then each message carries an HMAC under a key of this connection and direction, over its place in the sequence, its
length and its bytes: nothing can be forged, repeated, dropped, reordered or sent back. Nothing is encrypted.
"""

import contextlib
import hmac
import secrets
import socket
import struct
import time

NONCE_BYTES = MAC_BYTES = 32
LENGTH = struct.Struct(">I")
SEQUENCE = struct.Struct(">Q")
HEAD_BYTES = LENGTH.size + MAC_BYTES
MOST_READ_BYTES = 2**18
"""What one call reads, so that one endless sender cannot hold up the others"""
MOST_UNSENT_BYTES = 2**25


class ConnectionLostError(Exception):
    """The peer is gone or silent, or it violates the protocol."""


class SecretError(ConnectionLostError):
    """The peer does not know our secret, or closed the connection when it saw that we do not know its own."""


class Channel:
    """One end. `purpose` keeps proofs for one service from being used at another; `longest` limits a message."""

    def __init__(self, peer: socket.socket, secret: str, *, purpose: str, serves: bool, longest: int) -> None:
        peer.setblocking(False)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = peer
        self.ready = False
        """Both ends have proved that they know the secret"""
        self.bytes_read = 0
        self._serves, self._longest = serves, longest
        self._secret = _mac(secret.encode(), purpose.encode())
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        self._nonces = b""
        self._received = bytearray()
        self._unsent = bytearray(self._nonce if serves else b"")
        self._sent = self._taken = 0
        self._problem: ConnectionLostError | None = None

    @property
    def sending(self) -> bool:
        """True if some of what was sent waits until the peer reads."""
        return bool(self._unsent)

    def send(self, payload: bytes) -> None:
        """Queue a message; what cannot be sent now is sent by the next `receive`."""
        assert self.ready, "the peer has not proved that it belongs to this run"
        assert len(payload) <= self._longest, f"a message of {len(payload)} bytes"
        length = LENGTH.pack(len(payload))
        self._unsent += length + _mac(self._sending_key, SEQUENCE.pack(self._sent), length, payload) + payload
        self._sent += 1
        with contextlib.suppress(ConnectionLostError):
            self._flush()

    def receive(self) -> list[bytes]:
        """Messages received since the last call. Raises ConnectionLostError, but only after returning all messages."""
        found: list[bytes] = []
        try:
            if self._problem:
                raise self._problem
            self._flush()
            self._read()
        except ConnectionLostError as error:
            self._problem = error
        try:
            if not self.ready:
                self._greet()
            while self.ready and (payload := self._take()) is not None:
                found.append(payload)
        except ConnectionLostError as error:
            self._problem = error
        if self._problem and not found:
            raise self._problem
        return found

    def finish(self, timeout_s: float) -> None:
        """Send what is queued, wait for the peer to close (closing with unread data would discard it), and close."""
        deadline = time.monotonic() + timeout_s
        with contextlib.suppress(OSError, ConnectionLostError):
            while self._unsent and time.monotonic() < deadline:
                self._flush()
                time.sleep(0.01)
            self.socket.shutdown(socket.SHUT_WR)
            while time.monotonic() < deadline:
                self._received.clear()
                self._read()
                time.sleep(0.01)
        self.close()

    def close(self) -> None:
        self.socket.close()

    def _greet(self) -> None:
        """Continue the handshake with what has arrived. A closed connection may be the peer's answer to our proof."""
        if len(self._received) < self._expected():
            if isinstance(self._problem, ConnectionLostError) and not self._serves and self._nonces:
                raise SecretError("it refused our proof and closed the connection") from None
            return
        data = bytes(self._received[: self._expected()])
        if not self._serves and not self._nonces:
            self._nonces = data + self._nonce
            self._unsent += self._nonce + _mac(self._secret, b"client", self._nonces)
            self._received.clear()
            self._flush()
            return
        if self._serves:
            self._nonces = self._nonce + data[:NONCE_BYTES]
        whose = b"client" if self._serves else b"server"
        if not hmac.compare_digest(data[-MAC_BYTES:], _mac(self._secret, whose, self._nonces)):
            raise SecretError("it does not know the secret of this run")
        self._received.clear()
        self.ready = True
        to_server, to_client = (_mac(self._secret, way, self._nonces) for way in (b"to server", b"to client"))
        self._sending_key, self._receiving_key = (to_client, to_server) if self._serves else (to_server, to_client)
        if self._serves:
            self._unsent += _mac(self._secret, b"server", self._nonces)
            self._flush()

    def _expected(self) -> int:
        """Bytes of the handshake's next part: the server gets a nonce and a proof, the client one after the other."""
        return NONCE_BYTES + MAC_BYTES if self._serves else NONCE_BYTES

    def _take(self) -> bytes | None:
        if len(self._received) < HEAD_BYTES:
            return None
        head = bytes(self._received[:HEAD_BYTES])
        (length,) = LENGTH.unpack_from(head)
        if length > self._longest:
            raise ConnectionLostError(f"it sent a message of {length} bytes, more than {self._longest}")
        if len(self._received) < HEAD_BYTES + length:
            return None
        payload = bytes(self._received[HEAD_BYTES : HEAD_BYTES + length])
        mac = _mac(self._receiving_key, SEQUENCE.pack(self._taken), head[: LENGTH.size], payload)
        if not hmac.compare_digest(mac, head[LENGTH.size :]):
            raise ConnectionLostError("a message was forged or damaged")
        del self._received[: HEAD_BYTES + length]
        self._taken += 1
        return payload

    def _read(self) -> None:
        # nothing beyond the handshake's next part, so that a stranger can send 64 bytes at most
        left = MOST_READ_BYTES if self.ready else self._expected() - len(self._received)
        while left > 0:
            try:
                data = self.socket.recv(min(65536, left))
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                raise ConnectionLostError(error.strerror or str(error)) from None
            if not data:
                raise ConnectionLostError("the connection was closed")
            self._received += data
            self.bytes_read += len(data)
            left -= len(data)

    def _flush(self) -> None:
        try:
            while self._unsent:
                sent = self.socket.send(self._unsent)
                del self._unsent[:sent]
        except (BlockingIOError, InterruptedError):
            if len(self._unsent) > MOST_UNSENT_BYTES:
                raise ConnectionLostError("it does not read what it is sent") from None
        except OSError as error:
            raise ConnectionLostError(error.strerror or str(error)) from None


def _mac(key: bytes, *parts: bytes) -> bytes:
    return hmac.digest(key, b"".join(parts), "sha256")
