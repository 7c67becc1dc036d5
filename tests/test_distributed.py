"""Two real ranks agree on what rank 0 finds, and none waits for one that has failed."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest
import torch.distributed as dist

from ft_dist.distributed import control_store
from tests.conftest import ROOT
from tests.ports import free_port


def test_every_rank_learns_the_answer_or_the_error() -> None:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    place = {"PYTHONPATH": paths, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "tests.deciding"]
    started = time.monotonic()
    ranks = [
        subprocess.Popen(
            command, cwd=ROOT, env=os.environ | place | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in ranks]
    assert time.monotonic() - started < 60
    main, other = ({(one := json.loads(line))["case"]: one["got"] for line in text.splitlines()} for text in outputs)
    assert main["answer"] == other["answer"] == main["answer together"] == other["answer together"] == {"rank": 0}
    assert (main["user"], other["user"]) == ("DataError: x.jsonl: bad", "UserError: x.jsonl: bad")
    assert main["plain"] == "Plain: out of resource: shared memory\nmore"
    assert other["plain"] == "TrainingError: rank 0: Plain: out of resource: shared memory. Its log says where."
    # the first to fail keeps its own error
    assert sorted(got["memory together"].partition(":")[0] for got in (main, other)) == ["MemoryError", "TrainingError"]
    assert other["rank 1 alone"] == "MemoryError: only on rank 1"
    assert main["rank 1 alone"] == "TrainingError: rank 1: MemoryError: only on rank 1. Its log says where."
    assert main["rank 0 alone"] == "MemoryError: only on rank 0"
    assert other["rank 0 alone"] == "TrainingError: rank 0: MemoryError: only on rank 0. Its log says where."
    assert other["lost"].startswith("TrainingError: rank 1: rank 0 did not say")


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_threads_that_end_leave_their_connection_to_the_next(alone) -> None:
    """Each save has a thread: a run of many saves must not keep a connection for each."""

    def in_thread(meet: threading.Barrier) -> None:
        found.append(control_store())
        meet.wait(10)

    own = control_store()
    for together in (1, 1, 1, 2):
        found: list[dist.Store] = []
        meet = threading.Barrier(together)
        threads = [threading.Thread(target=in_thread, args=(meet,)) for _ in range(together)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({id(own), *map(id, found)}) == 1 + together
        if together == 1:
            first = found[0]
    assert any(store is first for store in found)
    assert control_store() is own
