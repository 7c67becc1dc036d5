"""Each cloud's notices follow its protocol, and only events that end this machine count."""

import threading
from datetime import datetime, timedelta, timezone

import pytest

from ft_dist.preemption.cloud import SERVICES, CloudPoller
from tests.preemption.metadata import VM, MetadataServer


@pytest.fixture
def server():
    with MetadataServer() as server:
        yield server


@pytest.mark.parametrize("cloud", SERVICES)
def test_a_notice_is_seen_once_announced(server, cloud):
    service = SERVICES[cloud](server.url)
    assert service.notice() is None
    server.announce(cloud)
    assert cloud in service.notice().lower()


def test_aws_takes_a_new_token_when_the_old_one_has_expired(server):
    service = SERVICES["aws"](server.url)
    assert service.notice() is None
    server.token = "token-2"
    server.announce("aws")
    assert service.notice() == "AWS spot notice (terminate)"


def test_aws_rebalance_recommendations_count_if_they_are_new(server):
    server.announce_rebalance(datetime.now(timezone.utc) - timedelta(minutes=10))
    service = SERVICES["aws"](server.url)
    assert service.notice() is None
    server.announce_rebalance(datetime.now(timezone.utc) + timedelta(seconds=2))
    assert service.notice() == "AWS rebalance recommendation"


def test_gcp_live_migration_is_no_notice(server):
    service = SERVICES["gcp"](server.url)
    server.answers["/computeMetadata/v1/instance/maintenance-event"] = "MIGRATE_ON_HOST_MAINTENANCE"
    assert service.notice() is None
    server.answers["/computeMetadata/v1/instance/maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
    assert service.notice() == "GCP host maintenance"


@pytest.mark.parametrize(
    "kind, machine, seen",
    [("Preempt", "worker-4", False), ("Freeze", VM, False), ("Terminate", VM, True), ("Reboot", VM, True)],
)
def test_azure_events_count_for_this_machine_if_they_end_it(server, kind, machine, seen):
    service = SERVICES["azure"](server.url)
    server.announce_azure(kind, "worker-1", machine)
    assert (service.notice() is not None) == seen


def test_a_service_that_does_not_answer_is_reported_once_and_still_polled(server, monkeypatch):
    monkeypatch.setattr(SERVICES["gcp"], "interval_s", 0.02)
    notes, asked = [], threading.Event()
    url = server.url
    server.shutdown()
    server.server_close()
    CloudPoller("gcp", endpoint=url, ask=lambda reason: asked.set(), say=notes.append)
    assert not asked.wait(0.5)
    assert len(notes) == 1
    assert "preemption.cloud=gcp" in notes[0]


def test_the_poller_asks_once(server, monkeypatch):
    monkeypatch.setattr(SERVICES["gcp"], "interval_s", 0.02)
    reasons, asked = [], threading.Event()
    CloudPoller("gcp", endpoint=server.url, ask=lambda reason: (reasons.append(reason), asked.set()), say=print)
    assert not asked.wait(0.3)
    server.announce("gcp")
    assert asked.wait(5)
    seen = len(server.requests)
    assert not threading.Event().wait(0.2)
    assert reasons == ["GCP preemption"]
    assert len(server.requests) == seen
