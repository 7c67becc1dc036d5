"""Preemption notices of a cloud, polled from its metadata service by a thread.

- AWS, two minutes ahead: IMDSv2 `spot/instance-action`, and the earlier `events/recommendations/rebalance`
  https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html
- GCP, 30 seconds ahead: `instance/preempted`, and 60 seconds ahead `instance/maintenance-event`
  https://cloud.google.com/compute/docs/instances/preemptible
- Azure, 30 seconds ahead: Scheduled Events
  https://learn.microsoft.com/azure/virtual-machines/linux/scheduled-events

No service is polled unless `preemption.cloud` names the cloud. Proxies are bypassed: the addresses are link-local.
"""

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Protocol

REQUEST_TIMEOUT_S = 2.0
FAILURES_UNTIL_REPORTED = 3
AWS_TOKEN_LIFE_S = 21600
AZURE_EVENTS = "/metadata/scheduledevents?api-version=2020-07-01"
AZURE_NAME = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
AZURE_ENDING = {"Preempt", "Terminate", "Reboot", "Redeploy"}
"""`Freeze` pauses a machine for seconds and ends nothing"""


class Service(Protocol):
    """One cloud's metadata service."""

    interval_s: float

    def notice(self) -> str | None:
        """The notice for this machine, or None. Raises OSError if the service does not answer."""


class Aws:
    interval_s = 5.0  # as AWS advises

    def __init__(self, endpoint: str | None) -> None:
        self._http = _Http(endpoint or "http://169.254.169.254")
        self._token: str | None = None
        self._started = datetime.now(timezone.utc)

    def notice(self) -> str | None:
        action = self._metadata("spot/instance-action")
        if action:
            return f"AWS spot notice ({json.loads(action).get('action')})"
        advice = self._metadata("events/recommendations/rebalance")
        # an older notice already stopped a previous start: acting on it again would stop every restart
        if advice and datetime.fromisoformat(json.loads(advice)["noticeTime"].replace("Z", "+00:00")) > self._started:
            return "AWS rebalance recommendation"
        return None

    def _metadata(self, path: str) -> str | None:
        for fresh in (False, True):
            if self._token is None or fresh:
                life = {"X-aws-ec2-metadata-token-ttl-seconds": str(AWS_TOKEN_LIFE_S)}
                self._token = self._http.get("/latest/api/token", life, method="PUT")
            try:
                return self._http.get(f"/latest/meta-data/{path}", {"X-aws-ec2-metadata-token": self._token or ""})
            except urllib.error.HTTPError as error:
                if error.code != 401 or fresh:
                    raise
        return None


class Gcp:
    interval_s = 1.0

    def __init__(self, endpoint: str | None) -> None:
        self._http = _Http(endpoint or "http://metadata.google.internal")

    def notice(self) -> str | None:
        if self._metadata("preempted") == "TRUE":
            return "GCP preemption"
        # a live migration does not end the machine
        if self._metadata("maintenance-event") == "TERMINATE_ON_HOST_MAINTENANCE":
            return "GCP host maintenance"
        return None

    def _metadata(self, name: str) -> str | None:
        return self._http.get(f"/computeMetadata/v1/instance/{name}", {"Metadata-Flavor": "Google"})


class Azure:
    interval_s = 1.0  # as Azure advises

    def __init__(self, endpoint: str | None) -> None:
        self._http = _Http(endpoint or "http://169.254.169.254")
        self._name: str | None = None

    def notice(self) -> str | None:
        events = json.loads(self._http.get(AZURE_EVENTS, {"Metadata": "true"}) or "{}").get("Events", [])
        for event in events:
            # the list covers the whole scale set
            if event["EventType"] in AZURE_ENDING and self._own_name() in event["Resources"]:
                return f"Azure scheduled event ({event['EventType']})"
        return None

    def _own_name(self) -> str | None:
        if self._name is None:
            self._name = self._http.get(AZURE_NAME, {"Metadata": "true"})
        return self._name


SERVICES: dict[str, Callable[[str | None], Service]] = {"aws": Aws, "gcp": Gcp, "azure": Azure}


class CloudPoller:
    """Polls the service of `cloud` until there is a notice, then calls `ask` once with its name.

    Calls `say` once if the service does not answer. The thread ends with the process.
    """

    def __init__(
        self, cloud: str, *, endpoint: str | None, ask: Callable[[str], None], say: Callable[[str], None]
    ) -> None:
        self._service = SERVICES[cloud](endpoint)
        self._cloud, self._ask, self._say = cloud, ask, say
        threading.Thread(target=self._run, name="cloud-notices", daemon=True).start()

    def _run(self) -> None:
        failures = 0
        while True:
            try:
                notice = self._service.notice()
                failures = 0
            except (OSError, ValueError, KeyError, TypeError) as error:
                notice = None
                failures += 1
                if failures == FAILURES_UNTIL_REPORTED:
                    self._say(f"preemption.cloud={self._cloud}: the metadata service does not answer ({error})")
            if notice:
                self._ask(notice)
                return
            time.sleep(self._service.interval_s)


class _Http:
    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint.rstrip("/")
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def get(self, path: str, headers: dict[str, str], *, method: str = "GET") -> str | None:
        """The body, or None for 404, which means no notice."""
        request = urllib.request.Request(self._endpoint + path, headers=headers, method=method)  # noqa: S310 - http(s), by the config's rule
        try:
            with self._opener.open(request, timeout=REQUEST_TIMEOUT_S) as response:
                return str(response.read().decode()).strip()
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise
