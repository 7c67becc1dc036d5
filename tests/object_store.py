"""A real S3 server on loopback (rclone over a folder), and a proxy in front of it that injects faults by rule.

The objects are plain files below `folder`, so a test can damage one, and they survive kill -9.
"""

import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

from tests.ports import free_port

BUCKET = "bucket"
KEY, SECRET = "test", "testtest"


class ObjectStore:
    """`rclone serve s3` on its own port; `kill` sends SIGKILL, `start` restarts it on the same port."""

    def __init__(self, root: Path) -> None:
        self.folder = root / BUCKET
        self.folder.mkdir(parents=True)
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"s3://{BUCKET}"

    @property
    def environment(self) -> dict[str, str]:
        return environment(self.port)

    def start(self) -> None:
        program = Path(sys.executable).parent / "rclone"
        command = [str(program) if program.exists() else shutil.which("rclone") or "rclone", "serve", "s3"]
        command += ["--addr", f"127.0.0.1:{self.port}", "--auth-key", f"{KEY},{SECRET}"]
        # no caches (0 would make it spin) and no stored checksums: the server answers with what is in the folder
        command += ["--vfs-cache-mode", "off", "--dir-cache-time", "1ms", "--config", os.devnull]
        self._process = subprocess.Popen(
            [*command, str(self.folder.parent)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 30
        while not _listens(self.port):
            assert self._process.poll() is None, "the server exited"
            assert time.monotonic() < deadline, "the server does not listen"
            time.sleep(0.05)

    def kill(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None


def environment(port: int) -> dict[str, str]:
    """Environment variables that point every S3 client at a port of this machine."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
    }


@contextmanager
def object_store(root: Path) -> Iterator[ObjectStore]:
    store = ObjectStore(root)
    store.start()
    try:
        yield store
    finally:
        store.kill()


@dataclass
class Rule:
    """How the first `times` requests that match `METHOD /path` fail: a status, no answer, half a body, or a reset.

    `hang` sends nothing until the client times out; `lose` forwards an upload and resets before the answer.
    """

    match: str
    answer: int | Literal["hang", "partial", "reset", "lose", "flip"]
    times: int = 1
    seen: int = 0
    """Requests that failed because of this rule"""


@dataclass
class Proxy:
    """Forwards to a port of this machine unless a rule applies; `requests` lists all requests."""

    upstream: int
    rules: list[Rule] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    port: int = 0
    closing: threading.Event = field(default_factory=threading.Event)

    @property
    def environment(self) -> dict[str, str]:
        return environment(self.port)

    def rule_for(self, request: str) -> Rule | None:
        self.requests.append(request)
        for rule in self.rules:
            if rule.seen < rule.times and re.search(rule.match, request):
                rule.seen += 1
                return rule
        return None


@contextmanager
def fault_proxy(upstream: int) -> Iterator[Proxy]:
    proxy = Proxy(upstream)

    class Handler(_Handler):
        pass

    Handler.proxy = proxy
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    proxy.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.closing.set()
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    proxy: Proxy

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b""
        rule = self.proxy.rule_for(f"{self.command} {self.path}")
        answer = rule.answer if rule else None
        if isinstance(answer, int):
            self._answer(answer, [], _error_body(answer))
        elif answer == "hang":
            self.proxy.closing.wait(120)
            self._reset()
        elif answer == "reset":
            self._reset()
        else:
            status, headers, content = self._forward(body)
            if answer == "lose":
                self._reset()
            elif answer == "flip":
                middle = len(content) // 2
                self._answer(status, headers, content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
            else:
                self._answer(status, headers, content, half=answer == "partial")

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve  # noqa: N815 - the names http.server calls

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.proxy.upstream, timeout=60)
        try:
            # the signature covers Host, so the client's header is kept
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "expect"):
                    connection.putheader(name, value)
            connection.endheaders(body or None)
            response = connection.getresponse()
            return response.status, response.getheaders(), response.read()
        except OSError:
            return 502, [], b""
        finally:
            connection.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes, *, half: bool = False) -> None:
        self.send_response_only(status)
        length = str(len(content))
        for name, value in headers:
            if name.lower() == "content-length":
                length = value  # for HEAD: the object's size, though there is no body
            elif name.lower() not in ("connection", "transfer-encoding"):
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if half else content)
        if half:
            self._reset()

    def _reset(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def _error_body(status: int) -> bytes:
    code = {429: "SlowDown", 500: "InternalError", 503: "ServiceUnavailable"}.get(status, "Failed")
    return f"<Error><Code>{code}</Code><Message>injected fault</Message></Error>".encode()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
