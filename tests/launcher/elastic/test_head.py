"""The head's decisions, event by event: the messages it sends to the nodes, and what it prints."""

import pytest

from ft_dist.launcher.elastic import head as head_module
from ft_dist.launcher.elastic.head import Head, Node
from ft_dist.launcher.elastic.restarts import RestartPolicy
from tests.launcher.elastic.test_restarts import commit


class Cluster:
    """A head, its nodes by name, and the messages sent to each."""

    def __init__(self, run_dir, minimum, maximum, *, max_restarts=3, join_timeout_s=60.0, grows_at_commits=True):
        self.lines: list[str] = []
        self.sent: dict[str, list[dict]] = {}
        self.nodes: dict[str, Node] = {}
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
            self.nodes[name] = Node(name, nproc, self.sent[name].append)
            self.head.join(self.nodes[name])
        self.head.tick()

    def end(self, codes):
        """Each node's only rank ends with its code, in this order."""
        shares = {name: self.share(name) for name in codes}
        for name, code in codes.items():
            self.head.worker_ended(self.nodes[name], shares[name]["round"], shares[name]["first_rank"], code)
        self.head.tick()

    def share(self, name):
        return [message for message in self.sent[name] if message["type"] == "start"][-1]["share"]

    def last(self, name):
        return {key: value for key, value in self.sent[name][-1].items() if key in ("type", "number", "code")}


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch):
    """Every wait is over immediately."""
    for name in ("SETTLE_S", "RESETTLE_S", "NOTICES_S", "WATCH_INTERVAL_S"):
        monkeypatch.setattr(head_module, name, 0.0)
    monkeypatch.setattr("ft_dist.launcher.elastic.restarts.LONGEST_PAUSE_S", 0.0)


def test_ranks_are_assigned_node_by_node(tmp_path):
    run = Cluster(tmp_path, 2, 2)
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


def test_a_failure_stops_and_restarts_all_workers(tmp_path):
    run = Cluster(tmp_path, 2, 2)
    run.join("a", "b")
    run.end({"b": -9})
    assert run.last("a") == {"type": "stop"}
    run.end({"a": None})
    run.head.tick()
    assert run.share("a")["round"] == run.share("b")["round"] == 2
    assert any("rank 1 on b was killed by SIGKILL" in line and "restart 1 of 3" in line for line in run.lines)


def test_a_hang_asks_every_node_for_stacks(tmp_path):
    run = Cluster(tmp_path, 2, 2, max_restarts=0)
    run.join("a", "b")
    run.end({"b": 76})
    assert [message.get("number") for message in run.sent["a"][-3:]] == [3, 18, None]
    run.end({"a": None})
    assert run.head.over == 76


@pytest.mark.parametrize("codes, whole", [((0, 0), 0), ((2, None), 2), ((0, 75), 75)])
def test_exit_codes_that_end_the_run(tmp_path, codes, whole):
    run = Cluster(tmp_path, 2, 2)
    run.join("a", "b")
    run.end(dict(zip("ab", codes, strict=True)))
    assert run.head.over == whole
    assert run.last("b") == {"type": "over", "code": whole}


def test_the_others_continue_without_a_lost_node_and_report_it(tmp_path):
    run = Cluster(tmp_path, 2, 3)
    run.join("a", "b", "c")
    run.head.lose(run.nodes["c"], "it was silent for 15 s")
    assert run.last("b") == {"type": "stop"}
    run.end({"a": None, "b": None})
    run.head.tick()
    assert run.share("b")["world_size"] == 2
    assert "the world has 2 nodes and 2 ranks: 3 were requested" in run.lines


def test_a_returning_node_joins_after_the_next_commit(tmp_path):
    run = Cluster(tmp_path, 2, 3)
    run.join("a", "b")
    run.head.tick()
    commit(tmp_path, 5)
    run.join("c")
    run.head.tick()
    assert run.last("a")["type"] == "start", "the commit of step 5 is older than the join"
    commit(tmp_path, 10)
    run.head.tick()
    assert run.last("a") == {"type": "signal", "number": 15}
    assert run.sent["c"] == []
    run.end({"a": 75, "b": 75})
    run.head.tick()
    assert run.share("c")["world_size"] == run.share("a")["world_size"] == 3
    assert run.head.over is None


def test_a_node_joins_immediately_if_the_run_never_commits(tmp_path):
    run = Cluster(tmp_path, 1, 2, grows_at_commits=False)
    run.join("a")
    run.join("b")
    assert run.last("a") == {"type": "signal", "number": 15}


def test_a_fixed_world_waits_for_all_nodes_and_reports_missing_ones(tmp_path):
    run = Cluster(tmp_path, 3, 3, join_timeout_s=0.0)
    run.join("a")
    assert run.head.over == 1
    assert "1 of 3 nodes joined (a), 2 missing within 0 s" in run.lines[-1]


def test_a_fixed_world_names_the_lost_nodes(tmp_path):
    run = Cluster(tmp_path, 2, 2)
    run.join("a", "b")
    run.head.lose(run.nodes["b"], "closed")
    run.end({"a": None})
    run.head._join_timeout_s = 0.0
    run.head.tick()
    assert run.head.over == 1
    assert "1 of 2 nodes joined (a), 1 missing; lost: b" in run.lines[-1]


def test_the_others_continue_when_one_node_is_preempted(tmp_path):
    run = Cluster(tmp_path, 2, 3)
    run.join("a", "b", "c")
    run.head.leave(run.nodes["c"], 15)
    run.end({"c": 75})
    assert run.last("a") == {"type": "signal", "number": 15}, "the others may wait for the rank that left"
    run.end({"a": 75, "b": 75})
    run.head.tick()
    assert run.last("c") == {"type": "over", "code": 75}
    run.head.tick()
    assert run.share("a")["world_size"] == 2


@pytest.mark.parametrize("preempted", [["a"], ["a", "b", "c"], ["b", "c"]])
def test_the_run_ends_when_the_head_or_too_many_nodes_are_preempted(tmp_path, preempted):
    run = Cluster(tmp_path, 2, 3)
    run.join("a", "b", "c")
    for name in preempted:
        run.head.leave(run.nodes[name], 15)
    run.end({"a": 75, "b": 75, "c": 75})
    run.head.tick()
    assert run.head.over == 75


def test_a_signalled_node_is_not_signalled_twice(tmp_path):
    run = Cluster(tmp_path, 1, 1)
    run.join("a", nproc=2)
    run.head.leave(run.nodes["a"], 10)
    run.head.worker_ended(run.nodes["a"], 1, 0, 75)
    assert run.last("a")["type"] == "start"


def test_messages_of_an_earlier_round_are_ignored(tmp_path):
    run = Cluster(tmp_path, 2, 2)
    run.join("a", "b")
    run.end({"a": -9, "b": None})
    run.head.tick()
    run.head.worker_ended(run.nodes["a"], 1, 0, 0)
    run.head.tick()
    assert run.share("a")["round"] == 2
    assert run.head.over is None


def test_a_surplus_node_waits_as_a_spare(tmp_path):
    run = Cluster(tmp_path, 2, 2)
    run.join("a", "b", "c")
    assert run.sent["c"] == []
    run.head.lose(run.nodes["b"], "closed")
    run.end({"a": None})
    run.head.tick()
    assert run.share("c")["first_rank"] == 1
