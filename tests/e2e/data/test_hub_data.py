"""A prepared set in a dataset repository of the hub is trained on from there."""

import pytest

from tests.conftest import SMALL_RUN, read_lines
from tests.hub import hub

pytestmark = pytest.mark.faults

RUN = [*SMALL_RUN, "optim.max_steps=4"]


def history(folder) -> list[tuple]:
    samples = (line["rows"] for line in read_lines(folder / "samples.jsonl"))
    return [(line["loss"], rows) for line, rows in zip(read_lines(folder / "metrics.jsonl"), samples, strict=True)]


def test_a_set_in_a_folder_of_a_repository_is_streamed(cli, tmp_path):
    sets = tmp_path / "repository" / "sets"
    done = cli("prepare", *RUN, "--to", str(sets))
    assert done.returncode == 0, done.stderr
    with hub(tmp_path / "repository", "me/mails") as served:
        own = {**served.environment, "HF_HOME": str(tmp_path / "home"), "FT_DIST_CACHE": str(tmp_path / "cache")}
        runs = []
        for name, path in (("here", str(sets / "train-0")), ("hub", "hf://datasets/me/mails/sets/train-0")):
            folder = tmp_path / name
            settings = [f"data.train=[{path}]", f"data.cache_dir={tmp_path / 'cache'}", f"output_dir={folder}"]
            done = cli("train", *RUN, *settings, "--nproc", "1", **own)
            assert done.returncode == 0, done.stdout + done.stderr
            runs.append(history(folder))
        assert runs[0] == runs[1]
        assert any("resolve" in request and "tokens-00000" in request for request in served.requests)
        missing = cli("check", *RUN, "data.train=[hf://datasets/me/mails/sets/train-7]", **own)
    assert missing.returncode == 2
    assert "hf://datasets/me/mails/sets/train-7" in missing.stderr
    assert "Traceback" not in missing.stderr
