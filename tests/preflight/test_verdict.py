"""Problems of a world whose ranks differ: node, value, fix, and whether they are fatal."""

import pytest

from ft_dist.preflight.verdict import clock_problems, problems, speed_problems


def world(*changes, size=None):
    """One rank per node, equal except for `changes`, one per node."""
    return [
        {
            "node": f"host{number}",
            "machine": f"host{number}",
            "rank": number,
            "world_size": size or len(changes),
            "local_size": 1,
            "code": "c0de",
            "config": "c0f1",
            "versions": {"python": "3.11.7", "torch": "2.13.0", "cuda": "None"},
            "open_files": 4096,
            "free_disk": 2**34,
            "address": {"interface": "eth0", "address": f"10.0.0.{number}"},
            "output_dir": "runs/a",
            "sees_output": True,
            "gpu": None,
        }
        | change
        for number, change in enumerate(changes)
    ]


GPU = {
    "count": 2,
    "fault": None,
    "name": "H100",
    "free": 79 * 2**30,
    "total": 80 * 2**30,
    "driver": "580.95.05",
    "errors": [],
}


def test_equal_ranks_have_no_problem():
    assert problems(world({}, {}, {})) == []
    assert problems(world({"gpu": GPU}, {"gpu": GPU})) == []


@pytest.mark.parametrize(
    "change, line",
    [
        (
            {"versions": {"python": "3.11.7", "torch": "2.12.0", "cuda": "None"}},
            "host2: torch is 2.12.0, but 2.13.0 on host0. Install the same version",
        ),
        ({"versions": {"python": "3.11.7", "torch": "2.13.0"}}, "host2: cuda is missing, but None on host0"),
        ({"code": "other"}, "host2: ft_dist's source is other, but c0de on host0. Install the same ft_dist"),
        ({"config": "other"}, "host2: the resolved config is other, but c0f1"),
        ({"world_size": 4}, "host2: world_size is 4, but 3 on host0. Start all ranks with the same WORLD_SIZE."),
        ({"sees_output": False}, "host2: output_dir=runs/a does not show what rank 0 writes there"),
        ({"open_files": 64}, "host2: at most 64 files may be open (ulimit -n), but 3 ranks need 268"),
        (
            {"address": {"interface": "lo", "address": "127.0.1.1"}},
            "host2: gloo would use lo (127.0.1.1), which other machines cannot reach",
        ),
    ],
)
def test_fatal_problems_name_the_node(change, line):
    (problem,) = problems(world({}, {}, change))
    assert problem.fatal
    assert problem.line.startswith(line)


@pytest.mark.parametrize(
    "change, line",
    [
        ({"versions": {"python": "3.12.1", "torch": "2.13.0", "cuda": "None"}}, "host1: python is 3.12.1"),
        ({"free_disk": 2**28}, "host1: 256 MiB are free for output_dir, less than 1024"),
    ],
)
def test_problems_that_are_not_fatal_are_reported(change, line):
    (problem,) = problems(world({}, change))
    assert not problem.fatal
    assert problem.line.startswith(line)


@pytest.mark.parametrize(
    "change, line, fatal",
    [
        ({"fault": "ECC error"}, "host1: the GPU of rank 1 does not work: ECC error", True),
        ({"free": 8 * 2**30}, "host1: the GPU of rank 1 has 8.0 of 80.0 GiB free", False),
        ({"name": "A100"}, "host1: GPU is A100, but H100 on host0", False),
        ({"driver": "535.54.03"}, "host1: GPU driver is 535.54.03, but 580.95.05 on host0. Install the same", False),
        ({"errors": ["a fault", "another"]}, "host1: the GPU of rank 1 has had a fault, another. Reset it", False),
    ],
)
def test_gpus(change, line, fatal):
    (problem,) = problems(world({"gpu": GPU}, {"gpu": GPU | change}))
    assert problem.line.startswith(line)
    assert problem.fatal == fatal


def test_an_unknown_driver_version_is_no_difference():
    assert problems(world({"gpu": GPU}, {"gpu": GPU | {"driver": None}})) == []


def test_more_ranks_than_gpus_are_reported_once_per_node():
    ranks = [facts | {"node": "host0", "local_size": 3} for facts in world({"gpu": GPU}, {"gpu": GPU}, {"gpu": GPU})]
    (problem,) = problems(ranks)
    assert problem.line.startswith("host0: 3 ranks for 2 visible GPUs. Use --nproc 2")


def test_one_machine_may_use_loopback():
    lo = {"address": {"interface": "lo", "address": "127.0.0.1"}, "machine": "laptop"}
    assert problems(world(lo, lo)) == []


def test_rank_0_is_the_reference_if_two_ranks_differ():
    (problem,) = problems(world({"code": "a"}, {"code": "b"}))
    assert problem.line.startswith("host1: ft_dist's source is b, but a on host0")


def test_a_clock_is_wrong_only_beyond_the_uncertainty():
    ranks = world({}, {}, {})
    assert clock_problems(ranks, [0.0, 4.0, -4.0], 0.01) == []
    assert clock_problems(ranks, [0.0, 20.0, 0.0], 30.0) == []
    (problem,) = clock_problems(ranks, [0.0, -90.0, 0.0], 0.01)
    assert problem.line.startswith("host1: its clock is 90 s behind host0's")


def test_the_slow_rank_is_named_and_not_the_others():
    (problem,) = speed_problems(world({}, {}, {}), [0.010, 0.050, 0.012])
    assert problem.line.startswith(
        "host1: rank 1 took 50.0 ms for work that takes others 12.0 ms (4 times; 3 are allowed)"
    )
    assert speed_problems(world({}, {}), [0.010, 0.029]) == []
