"""Two real ranks agree on what rank 0 finds, and none waits for one that has failed."""

import json
import os
import subprocess
import sys
import time

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
