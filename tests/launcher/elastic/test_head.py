"""The head's decisions, told event by event: what it sends to the machines, and what it says."""

import pytest

from ft_dist.launcher.elastic import head as head_module
from ft_dist.launcher.elastic.head import Head, Member
from ft_dist.launcher.elastic.restarts import RestartPolicy
from tests.launcher.elastic.test_restarts import commit


class Run:
    """A head, the machines that it knows by name, and the messages to each."""

    def __init__(self, run_dir, minimum, maximum, *, max_restarts=3, join_timeout_s=60.0, grows_at_commits=True):
        self.lines: list[str] = []
        self.sent: dict[str, list[dict]] = {}
        self.members: dict[str, Member] = {}
        self.head = Head(
            minimum=minimum,
            maximum=maximum,
            policy=RestartPolicy(max_restarts, run_dir),
            run_dir=run_dir,
            grows_at_commits=grows_at_commits,
            join_timeout_s=join_timeout_s,
            master=lambda: ("10.0.0.1", 4000),
            say=self.lines.append,
        )

    def join(self, *names, nproc=1):
        for name in names:
            self.sent.setdefault(name, [])
            self.members[name] = Member(name, nproc, self.sent[name].append)
            self.head.join(self.members[name])
        self.head.tick()

    def end(self, codes):
        """Machines' single ranks end with these codes, in the order given."""
        shares = {name: self.share(name) for name in codes}
        for name, code in codes.items():
            self.head.worker_ended(self.members[name], shares[name]["round"], shares[name]["first_rank"], code)
        self.head.tick()

    def share(self, name):
        return [message for message in self.sent[name] if message["type"] == "start"][-1]["share"]

    def last(self, name):
        return {key: value for key, value in self.sent[name][-1].items() if key in ("type", "number", "code")}


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """No pauses: what is waited for has come."""
    for name in ("SETTLE_S", "RESETTLE_S", "NOTICES_S", "WATCH_INTERVAL_S"):
        monkeypatch.setattr(head_module, name, 0.0)
    monkeypatch.setattr("ft_dist.launcher.elastic.restarts.LONGEST_PAUSE_S", 0.0)


def test_ranks_are_dealt_out_machine_by_machine(tmp_path):
    run = Run(tmp_path, 2, 2)
    run.join("a", nproc=2)
    assert run.sent["a"] == []
    run.join("b", nproc=3)
    assert run.share("b") | {"round": 1} == {
        "round": 1,
        "first_rank": 2,
        "nproc": 3,
        "world_size": 5,
        "node_rank": 1,
        "nodes": 2,
        "master_addr": "10.0.0.1",
        "master_port": 4000,
    }
    assert run.share("a")["first_rank"] == 0


def test_a_failure_stops_all_and_starts_all_again(tmp_path):
    run = Run(tmp_path, 2, 2)
    run.join("a", "b")
    run.end({"b": -9})
    assert run.last("a") == {"type": "stop"}
    run.end({"a": None})
    run.head.tick()
    assert run.share("a")["round"] == run.share("b")["round"] == 2
    assert any("rank 1 on b was killed by SIGKILL" in line and "restart 1 of 3" in line for line in run.lines)


def test_a_hang_asks_everyone_for_stacks(tmp_path):
    run = Run(tmp_path, 2, 2, max_restarts=0)
    run.join("a", "b")
    run.end({"b": 76})
    assert [message.get("number") for message in run.sent["a"][-3:]] == [3, 18, None]
    run.end({"a": None})
    assert run.head.over == 76


@pytest.mark.parametrize("codes, whole", [((0, 0), 0), ((2, None), 2), ((0, 75), 75)])
def test_what_is_not_started_again(tmp_path, codes, whole):
    run = Run(tmp_path, 2, 2)
    run.join("a", "b")
    run.end(dict(zip("ab", codes, strict=True)))
    assert run.head.over == whole
    assert run.last("b") == {"type": "over", "code": whole}


def test_the_rest_goes_on_without_a_lost_machine_and_says_so(tmp_path):
    run = Run(tmp_path, 2, 3)
    run.join("a", "b", "c")
    run.head.lose(run.members["c"], "nothing was heard for 15 s")
    assert run.last("b") == {"type": "stop"}
    run.end({"a": None, "b": None})
    run.head.tick()
    assert run.share("b")["world_size"] == 2
    assert "the world is 2 nodes and 2 ranks: 3 were asked for" in run.lines


def test_a_machine_that_is_back_is_taken_in_after_the_next_commit(tmp_path):
    run = Run(tmp_path, 2, 3)
    run.join("a", "b")
    run.head.tick()
    commit(tmp_path, 5)
    run.join("c")
    run.head.tick()
    assert run.last("a")["type"] == "start", "the commit of step 5 was there before"
    commit(tmp_path, 10)
    run.head.tick()
    assert run.last("a") == {"type": "signal", "number": 15}
    assert run.sent["c"] == []
    run.end({"a": 75, "b": 75})
    run.head.tick()
    assert run.share("c")["world_size"] == run.share("a")["world_size"] == 3
    assert run.head.over is None


def test_without_commits_to_wait_for_it_is_taken_in_at_once(tmp_path):
    run = Run(tmp_path, 1, 2, grows_at_commits=False)
    run.join("a")
    run.join("b")
    assert run.last("a") == {"type": "signal", "number": 15}


def test_a_fixed_number_waits_for_all_and_says_which_are_missing(tmp_path):
    run = Run(tmp_path, 3, 3, join_timeout_s=0.0)
    run.join("a")
    assert run.head.over == 1
    assert "1 of 3 nodes are here (a), 2 missing within 0 s" in run.lines[-1]


def test_a_fixed_number_names_the_lost(tmp_path):
    run = Run(tmp_path, 2, 2)
    run.join("a", "b")
    run.head.lose(run.members["b"], "closed")
    run.end({"a": None})
    run.head._join_timeout_s = 0.0
    run.head.tick()
    assert run.head.over == 1
    assert "1 of 2 nodes are here (a), 1 missing; lost: b" in run.lines[-1]


def test_a_notice_to_one_machine_leaves_the_run_to_the_others(tmp_path):
    run = Run(tmp_path, 2, 3)
    run.join("a", "b", "c")
    run.head.leave(run.members["c"], 15)
    run.end({"c": 75})
    assert run.last("a") == {"type": "signal", "number": 15}, "the others may wait for the one that left"
    run.end({"a": 75, "b": 75})
    run.head.tick()
    assert run.last("c") == {"type": "over", "code": 75}
    run.head.tick()
    assert run.share("a")["world_size"] == 2


@pytest.mark.parametrize("told", [["a"], ["a", "b", "c"], ["b", "c"]])
def test_a_notice_to_the_head_or_to_too_many_ends_the_run(tmp_path, told):
    run = Run(tmp_path, 2, 3)
    run.join("a", "b", "c")
    for name in told:
        run.head.leave(run.members[name], 15)
    run.end({"a": 75, "b": 75, "c": 75})
    run.head.tick()
    assert run.head.over == 75


def test_the_told_are_not_signalled_a_second_time(tmp_path):
    run = Run(tmp_path, 1, 1)
    run.join("a", nproc=2)
    run.head.leave(run.members["a"], 10)
    run.head.worker_ended(run.members["a"], 1, 0, 75)
    assert run.last("a")["type"] == "start"


def test_words_of_an_earlier_round_are_ignored(tmp_path):
    run = Run(tmp_path, 2, 2)
    run.join("a", "b")
    run.end({"a": -9, "b": None})
    run.head.tick()
    run.head.worker_ended(run.members["a"], 1, 0, 0)
    run.head.tick()
    assert run.share("a")["round"] == 2
    assert run.head.over is None


def test_a_machine_too_many_waits_as_a_spare(tmp_path):
    run = Run(tmp_path, 2, 2)
    run.join("a", "b", "c")
    assert run.sent["c"] == []
    run.head.lose(run.members["b"], "closed")
    run.end({"a": None})
    run.head.tick()
    assert run.share("c")["first_rank"] == 1
