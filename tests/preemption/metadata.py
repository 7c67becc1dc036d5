"""The metadata services of AWS, GCP and Azure on loopback, as strict about tokens and headers as documented."""

import json
import threading
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

VM = "worker-3"


class MetadataServer(ThreadingHTTPServer):
    """`announce(...)` makes a notice appear; `requests` lists the paths requested. Use as a context manager."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: dict[str, str] = {
            "/computeMetadata/v1/instance/preempted": "FALSE",
            "/computeMetadata/v1/instance/maintenance-event": "NONE",
            "/metadata/scheduledevents": json.dumps({"DocumentIncarnation": 1, "Events": []}),
            "/metadata/instance/compute/name": VM,
        }
        self.requests: list[str] = []
        self.token = "token-1"
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> "MetadataServer":
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def announce(self, cloud: str) -> None:
        """Announce that the machine will be taken away."""
        if cloud == "aws":
            when = (datetime.now(timezone.utc) + timedelta(minutes=2)).strftime("%Y-%m-%dT%H:%M:%SZ")
            self.answers["/latest/meta-data/spot/instance-action"] = json.dumps({"action": "terminate", "time": when})
        elif cloud == "gcp":
            self.answers["/computeMetadata/v1/instance/preempted"] = "TRUE"
        else:
            self.announce_azure("Preempt", VM)

    def announce_rebalance(self, when: datetime) -> None:
        notice = {"noticeTime": when.strftime("%Y-%m-%dT%H:%M:%SZ")}
        self.answers["/latest/meta-data/events/recommendations/rebalance"] = json.dumps(notice)

    def announce_azure(self, kind: str, *machines: str) -> None:
        event = {
            "EventId": "f020ba2e-3bc0-4c40-a10b-86575a9eabd5",
            "EventType": kind,
            "ResourceType": "VirtualMachine",
            "Resources": list(machines),
            "EventStatus": "Scheduled",
            "NotBefore": "",
        }
        self.answers["/metadata/scheduledevents"] = json.dumps({"DocumentIncarnation": 2, "Events": [event]})


class _Handler(BaseHTTPRequestHandler):
    server: MetadataServer

    def do_PUT(self) -> None:
        if self.path == "/latest/api/token" and self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "").isdigit():
            self._answer(200, self.server.token)
        else:
            self._answer(400, "")

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        self.server.requests.append(path)
        if path.startswith("/latest/") and self.headers.get("X-aws-ec2-metadata-token") != self.server.token:
            self._answer(401, "")
        elif path.startswith("/computeMetadata/") and self.headers.get("Metadata-Flavor") != "Google":
            self._answer(403, "")
        elif path.startswith("/metadata/") and (
            self.headers.get("Metadata") != "true" or "api-version=20" not in query
        ):
            self._answer(400, "")
        elif path in self.server.answers:
            self._answer(200, self.server.answers[path])
        else:
            self._answer(404, "")

    def _answer(self, code: int, body: str) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: Any) -> None:
        pass
