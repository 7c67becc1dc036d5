"""A repository of the Hugging Face hub on loopback, with the few API calls needed to read its files.

https://huggingface.co/docs/hub/api; `environment` points huggingface_hub at it.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serves `folder` as the only repository, `repo`; `requests` lists the requests received."""

    def __init__(self, folder: Path, repo: str, port: int) -> None:
        self.folder, self.repo = folder, repo
        self.environment = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HUB_OFFLINE": "0"}
        self.requests: list[str] = []
        self.commit = COMMIT
        """What `main` is"""

    def listing(self, folder: str, *, recursive: bool) -> list[dict[str, object]]:
        found = (self.folder / folder).rglob("*") if recursive else (self.folder / folder).iterdir()
        return [self.entry(path) for path in sorted(found)]

    def entry(self, path: Path) -> dict[str, object]:
        kind = "directory" if path.is_dir() else "file"
        size = 0 if path.is_dir() else path.stat().st_size
        return {"type": kind, "path": str(path.relative_to(self.folder)), "size": size, "oid": self.commit}


@contextmanager
def hub(folder: Path, repo: str, *, kind: str = "datasets") -> Iterator[Hub]:
    """`kind`: datasets or models."""
    at = repo if kind == "models" else f"{kind}/{repo}"

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            served.requests.append(f"{self.command} {self.path} {self.headers.get('Range', '')}".strip())
            path = unquote(url.path)
            if re.fullmatch(rf"/api/{kind}/{repo}(/revision/\w+)?", path):
                self.answer({"id": repo, "sha": served.commit, "private": False, "tags": [], "siblings": []})
            elif found := re.fullmatch(rf"/api/{kind}/{repo}/tree/\w+(?:/(.*))?", path):
                below = found[1] or ""
                if (folder / below).is_dir():
                    self.answer(served.listing(below, recursive="recursive=true" in url.query.lower()))
                else:
                    self.missing("EntryNotFound")
            elif (found := re.fullmatch(rf"/{at}/resolve/\w+/(.*)", path)) and (folder / found[1]).is_file():
                self.send_part((folder / found[1]).read_bytes())
            else:
                self.missing("EntryNotFound" if repo in path else "RepoNotFound")

        def do_HEAD(self) -> None:
            self.do_GET()

        def send_part(self, content: bytes) -> None:
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if not wanted:
                self.send(200, content, {"ETag": hashlib.md5(content).hexdigest(), "X-Repo-Commit": served.commit})
                return
            start, end = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
            self.send(206, content[start : end + 1], {"Content-Range": f"bytes {start}-{end}/{len(content)}"})

        def answer(self, content: object) -> None:
            self.send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

        def missing(self, code: str) -> None:
            self.send(404, b"{}", {"X-Error-Code": code, "X-Error-Message": "not there"})

        def send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Logs nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    served = Hub(folder, repo, server.server_address[1])
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
