"""A prepared set's bytes do not depend on the number of workers or on how often preparing was killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ft_dist.config.schema import DataConfig
from ft_dist.data.prepare.build import Progress, prepare
from ft_dist.data.store.store import TokenStore
from ft_dist.errors import DataError
from ft_dist.storage.file_digests import SETTLED_S
from tests.conftest import ROOT
from tests.data.conftest import build_tokenizer
from tests.data.preparing import main

RECORDS = 3000


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("source") / "chats.jsonl"
    generator = np.random.default_rng(0)
    with path.open("w") as file:
        for number, length in enumerate(generator.integers(1, 90, RECORDS).tolist()):
            turns = [
                {"role": "user", "content": f"count to {number}"},
                {"role": "assistant", "content": "the " * length},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory) -> dict[str, bytes]:
    """The set that one uninterrupted process writes."""
    place = tmp_path_factory.mktemp("whole") / "set"
    main(str(source), str(place), "1")
    return contents(place)


def contents(place: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(f"{place}-0").iterdir()}


def test_a_set_holds_the_requested_data(whole, source, tmp_path):
    assert len([name for name in whole if name.startswith("tokens-")]) > 8
    assert not [name for name in whole if name.startswith(("part-", "progress"))]
    index = json.loads(whole["index.json"])
    assert index["samples"] == RECORDS
    place = tmp_path / "set"
    place.mkdir()
    for name, content in whole.items():
        (place / name).write_bytes(content)
    TokenStore.open(place).verify()


@pytest.mark.parametrize("workers", [2, 3])
def test_same_bytes_for_any_number_of_workers(whole, source, tmp_path, workers):
    main(str(source), str(tmp_path / "set"), str(workers))
    assert contents(tmp_path / "set") == whole


def test_killed_twice_and_continued_gives_the_same_bytes(whole, source, tmp_path):
    place = tmp_path / "set"
    reached = [killed_after(source, place, shards=3), killed_after(source, place, shards=6)]
    assert reached[0] < reached[1] < len([name for name in whole if name.startswith("tokens-")])
    assert not (tmp_path / "set-0" / "index.json").exists()
    done = start(source, place)
    out, _ = done.communicate(timeout=120)
    assert done.returncode == 0
    first_records = int(out.splitlines()[0].partition("records=")[2].partition(",")[0])
    assert first_records > 40, "it began at the first record again"
    assert contents(place) == whole


def start(source: Path, place: Path, *where: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.data.preparing", str(source), str(place), "2", *where]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def killed_after(source: Path, place: Path, *where: str, shards: int) -> int:
    """Shards that were finished when the process was killed; its workers end by themselves."""
    process = start(source, place, *where)
    deadline = time.monotonic() + 120
    while (reached := finished(unfinished_set(place, *where) / "progress.json")) < shards:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    children = children_of(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert children
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)
    return max(reached, finished(unfinished_set(place, *where) / "progress.json"))


def unfinished_set(place: Path, *where: str) -> Path:
    """The folder of the only set in progress."""
    found = Path(f"{place}-cache/data").glob("*/progress.json")
    return next((file.parent for file in found), place) if where else Path(f"{place}-0")


def finished(progress: Path) -> int:
    return len(json.loads(progress.read_text())["shards"]) if progress.exists() else 0


def children_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_different_data_never_continues_or_replaces_a_set(whole, source, tmp_path):
    place = tmp_path / "set"
    main(str(source), str(place), "1")
    changed = tmp_path / "changed.jsonl"
    changed.write_text(source.read_text().replace("count to 7", "count to 8", 1))
    with pytest.raises(DataError, match=r"set-0: holds a set with other data, another tokenizer or other options"):
        main(str(changed), str(place), "1")
    assert contents(place) == whole

    def interrupt(now: Progress) -> None:
        if now.records > RECORDS / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        main(str(source), str(tmp_path / "part"), "1", on_progress=interrupt)
    with pytest.raises(DataError, match=r"part-0: holds an unfinished set of other data"):
        main(str(changed), str(tmp_path / "part"), "1")


@pytest.mark.parametrize("where", [(), ("cache",)])
def test_nothing_is_reused_if_the_file_changed_after_a_kill(source, tmp_path, where):
    """Same size and old modification time, as after `cp -p` or `rsync -t`."""
    data, place = tmp_path / "chats.jsonl", tmp_path / "set"
    old, new = (source.read_text().replace("count to 7", f"count to {digit}", 1) for digit in "78")
    data.write_text(old)
    long_ago = time.time() - 3600
    os.utime(data, (long_ago, long_ago))
    time.sleep(SETTLED_S + 0.1)  # from now on its digest is cached
    killed_after(data, place, *where, shards=3)
    left = unfinished_set(place, *where)
    before = {file.name: file.read_bytes() for file in left.iterdir()}
    data.write_text(new)
    os.utime(data, (long_ago, long_ago))

    again = start(data, place, *where)
    _, err = again.communicate(timeout=120)
    if not where:
        assert again.returncode == 1
        assert "set-0: holds an unfinished set of other data" in err
    else:
        assert again.returncode == 0, err
        main(str(data), str(tmp_path / "fresh"), "1")
        (index,) = Path(f"{place}-cache/data").glob("*/index.json")
        tokens = {file.name: file.read_bytes() for file in index.parent.glob("tokens-*")}
        fresh = contents(tmp_path / "fresh")
        assert index.parent != left
        assert index.read_bytes() == fresh["index.json"]
        assert tokens == {name: content for name, content in fresh.items() if name.startswith("tokens-")}
    assert {file.name: file.read_bytes() for file in left.iterdir()} == before


def test_a_prepared_set_is_a_source_and_must_match(whole, source, tmp_path):
    place = tmp_path / "set"
    main(str(source), str(place), "1")

    def reuse(**options: object):
        data = DataConfig.model_validate({"train": [f"{place}-0"], "cache_dir": str(tmp_path / "cache"), **options})
        return prepare(data.train, tokenizer, data=data, model_path="tiny")

    tokenizer = build_tokenizer("chatml")
    prepared = reuse()
    assert (len(prepared.store), prepared.reused) == (RECORDS, [True])
    with pytest.raises(DataError, match=r"a different data\.max_length \(2048, the config says 64\)"):
        reuse(max_length=64)
    tokenizer.chat_template += "{# #}"
    with pytest.raises(DataError, match="prepared with a different chat template"):
        reuse()
    tokenizer = build_tokenizer("base")
    with pytest.raises(DataError, match="prepared with a different tokenizer"):
        reuse()


@pytest.mark.parametrize("where", [(), ("cache",)])
def test_a_file_that_changes_while_it_is_read_leaves_no_set(source, tmp_path, where):
    """Same size and modification time. The file before the change is prepared as if nothing had been there."""
    data, place = tmp_path / "chats.jsonl", tmp_path / "set"
    data.write_text(source.read_text())
    long_ago = time.time() - 3600
    os.utime(data, (long_ago, long_ago))

    def change(now: Progress) -> None:
        if now.records > RECORDS / 2:
            data.write_text(source.read_text().replace("count to 2999", "count to 1000", 1))
            os.utime(data, (long_ago, long_ago))

    with pytest.raises(DataError, match=r"chats\.jsonl: changed while it was read"):
        main(str(data), str(place), "1", *where, on_progress=change)
    assert not list(tmp_path.rglob("index.json"))
    assert not list(tmp_path.rglob("progress.json"))
    data.write_text(source.read_text())
    main(str(data), str(tmp_path / "set"), "1", *where)
    main(str(data), str(tmp_path / "fresh"), "1")
    (index,) = [path for path in tmp_path.rglob("index.json") if "fresh" not in str(path)]
    assert index.read_bytes() == (tmp_path / "fresh-0" / "index.json").read_bytes()


def test_a_damaged_unfinished_shard_is_written_again(whole, source, tmp_path):
    def interrupt(now: Progress) -> None:
        if now.records > RECORDS / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        main(str(source), str(tmp_path / "set"), "1", on_progress=interrupt)
    for name in ("tokens-00001.safetensors", "part-00002.safetensors"):
        file = tmp_path / "set-0" / name
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    main(str(source), str(tmp_path / "set"), "1")
    assert contents(tmp_path / "set") == whole
