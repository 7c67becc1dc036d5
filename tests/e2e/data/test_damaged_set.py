"""A flipped byte in a prepared set, on one of two machines, ends the run on all ranks before it is trained on."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ft_dist.data.store.store import TokenStore
from tests.conftest import ROOT, SMALL_RUN, read_lines
from tests.data.store.test_store import write_set
from tests.ports import free_port

CHATS = [
    {"messages": [{"role": "user", "content": f"count to {n}"}, {"role": "assistant", "content": "one " * (n % 9 + 1)}]}
    for n in range(60)
]


@pytest.fixture
def machines(cli, tmp_path: Path) -> list[Path]:
    """Two folders, each with the same set of many shards below the same relative path."""
    source = tmp_path / "chats.jsonl"
    source.write_text("".join(json.dumps(chat) + "\n" for chat in CHATS))
    done = cli("prepare", *SMALL_RUN, f"data.train={source}", "--to", str(tmp_path / "whole"))
    assert done.returncode == 0, done.stderr
    whole = tmp_path / "whole" / "train-0"
    store = TokenStore.open(whole)
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
        cut = write_set(folder / "set", [store.sample(n) for n in range(len(store))], shard_tokens=1).index.model_dump()
        index = json.loads((whole / "index.json").read_text())
        del index["checksum"]
        (folder / "set" / "index.json").write_text(
            json.dumps(index | {"shards": cut["shards"], "lengths": cut["lengths"]})
        )
        for name in ("report.json", "sketches.safetensors"):
            shutil.copy(whole / name, folder / "set" / name)
    return folders


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.faults
def test_one_damaged_copy_ends_all_ranks_with_one_line(machines: list[Path], tmp_path: Path) -> None:
    damaged = machines[1] / "set" / "tokens-00050.safetensors"
    flip(damaged)
    run, port = tmp_path / "run", free_port()
    arguments = [*SMALL_RUN, "data.train=[set]", f"output_dir={run}", "optim.max_steps=2000"]
    arguments += ["checkpoint.interval_steps=1", f"data.cache_dir={tmp_path / 'cache'}", "evaluate.before=false"]
    ranks = []
    for rank, folder in enumerate(machines):
        world = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = os.environ | {name: str(value) for name, value in world.items()}
        environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'kernels'}"
        command = [sys.executable, "-m", "ft_dist.train", *arguments]
        ranks.append(
            subprocess.Popen(
                command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    said = [rank.communicate(timeout=200) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], said
    shown = [out + err for out, err in said]
    logs = "".join(path.read_text() for path in (run / "logs").iterdir())
    assert "Traceback" not in "".join(shown) + logs
    assert f"{damaged.name}: damaged (its checksum is" in shown[0]
    steps = read_lines(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
    assert len(steps) < 100
    commits = [folder.name for folder in (run / "checkpoints").glob("step-*")]
    assert len(commits) <= len(steps)
