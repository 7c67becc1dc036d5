"""When a failed run is restarted, and what is reported."""

import errno
import itertools
import json
import os

import pytest

from ft_dist.checkpoint.commit import format as layout
from ft_dist.launcher.elastic.restarts import AgentEvents, RestartPolicy, describe_exit, last_step


def commit(run_dir, step):
    staging = run_dir / "checkpoints" / f"step-{step:08d}.staging"
    staging.mkdir(parents=True)
    files = {layout.STATE: layout.write_synced(staging / layout.STATE, json.dumps({"step": step}))}
    layout.write_manifest(staging, step, files)
    layout.publish(staging, layout.step_folder(run_dir / "checkpoints", step))


def reach(run_dir, step):
    run_dir.mkdir(exist_ok=True)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step}) + "\n")


def test_pauses_double_until_the_restarts_are_used_up(tmp_path):
    policy = RestartPolicy(3, tmp_path)
    pauses = []
    for step in (1, 2, 3):
        reach(tmp_path, step)
        pauses.append(policy.after_failure("rank 0 failed", of_workers=True).pause_s)
    assert pauses == [1, 2, 4]
    reach(tmp_path, 4)
    verdict = policy.after_failure("rank 0 failed", of_workers=True)
    assert verdict.pause_s is None
    assert "3 restarts without a new commit (--max-restarts 3)" in verdict.line
    assert "from the beginning" in verdict.line


def test_a_new_commit_resets_the_restart_count(tmp_path):
    policy = RestartPolicy(1, tmp_path)
    for step in (5, 10, 15):
        commit(tmp_path, step)
        verdict = policy.after_failure("rank 0 failed", of_workers=True)
        assert verdict.pause_s == 1
        assert f"the commit of step {step}" in verdict.line
    assert policy.after_failure("rank 0 failed", of_workers=True).pause_s is None


def test_a_disk_that_does_not_answer_is_no_new_commit(tmp_path, monkeypatch):
    """Every second look at it fails: the restarts are still counted."""
    commit(tmp_path, 20)
    policy = RestartPolicy(3, tmp_path)
    looks = itertools.count()

    def listed(place):
        if next(looks) % 2 == 0:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return scan(place)

    scan = os.listdir
    monkeypatch.setattr(layout.os, "listdir", listed)
    monkeypatch.setattr(layout, "patiently", lambda call, wait_s: call())  # without the second that it waits
    found = [policy.after_failure("rank 0 died", of_workers=False) for _ in range(5)]
    assert [decision.pause_s for decision in found] == [1, 2, 4, None, None]
    assert "the commit of step 20" in found[-1].line


def test_three_failures_of_the_same_step_end_the_run(tmp_path):
    policy = RestartPolicy(100, tmp_path)
    commit(tmp_path, 10)
    reach(tmp_path, 12)
    assert policy.after_failure("ValueError: a", of_workers=True).pause_s is not None
    assert policy.after_failure("ValueError: a", of_workers=True).pause_s is not None
    verdict = policy.after_failure("ValueError: a", of_workers=True)
    assert verdict.pause_s is None
    assert verdict.own_fault
    assert "step 13 failed 3 times" in verdict.line
    assert "the commit of step 10" in verdict.line
    assert "ValueError: a" in verdict.line


def test_lost_machines_do_not_count_as_failures_of_a_step(tmp_path):
    policy = RestartPolicy(100, tmp_path)
    reach(tmp_path, 12)
    assert all(policy.after_failure("host lost", of_workers=False).pause_s for _ in range(9))


def test_failures_of_different_steps_are_not_added_up(tmp_path):
    policy = RestartPolicy(100, tmp_path)
    for step in (1, 2, 3, 4, 5):
        reach(tmp_path, step)
        assert policy.after_failure("rank 0 failed", of_workers=True).pause_s


def test_the_message_names_a_limit_of_zero_restarts(tmp_path):
    assert "not restarted (--max-restarts 0)" in RestartPolicy(0, tmp_path).after_failure("x", of_workers=True).line


@pytest.mark.parametrize("tail", ["", '{"step": 9, "lo', "\n\n"])
def test_a_truncated_last_line_does_not_hide_the_last_step(tmp_path, tail):
    reach(tmp_path, 8)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(tail)
    assert last_step(tmp_path) == 8


def test_the_last_log_line_is_reported_unless_it_predates_the_round(tmp_path):
    (tmp_path / "logs").mkdir()
    log = tmp_path / "logs" / "rank-2.log"
    log.write_text("Traceback ...\nValueError: no such token\n\n")
    line = describe_exit(2, 1, node="host2", run_dir=tmp_path, since=0)
    assert line == "rank 2 on host2 exited with 1: ValueError: no such token"
    later = log.stat().st_mtime + 1
    assert describe_exit(2, 1, node="", run_dir=tmp_path, since=later) == "rank 2 exited with 1"
    assert describe_exit(2, -9, node="", run_dir=tmp_path, since=0).startswith("rank 2 was killed by SIGKILL")


def test_events_wait_for_the_run_folder(tmp_path):
    events = AgentEvents(tmp_path / "run")
    events.add("restarted", count=1)
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "events.jsonl").write_text('{"event": "start"}\n')
    events.flush()
    events.flush()
    lines = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["start", "restarted"]
