"""Which commit a real run resumes from, and which it refuses: its own newest, never that of another run."""

import json
import shutil

import pytest

from ft_dist.checkpoint.commit.format import STATE, commits, write_manifest, write_synced
from tests.conftest import SMALL_RUN, read_lines, start_cli

pytestmark = pytest.mark.faults
RUN = [*SMALL_RUN, "checkpoint.interval_steps=2", "checkpoint.keep=20"]


def train(cli, folder, *more, **environment):
    return cli("train", *RUN, f"output_dir={folder}", *more, "--nproc", "1", **environment)


def steps(root):
    return [commit.step for commit in commits(root)]


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A finished run, to start others from."""
    folder = tmp_path_factory.mktemp("other") / "run"
    with start_cli("train", *RUN, f"output_dir={folder}", "optim.max_steps=4", "--nproc", "1") as process:
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    return folder


def test_a_named_checkpoint_counts_until_the_run_has_its_own(cli, tmp_path, other):
    folder, start = tmp_path / "run", f"checkpoint.resume={other / 'checkpoints/step-00000004'}"
    first = train(cli, folder, start, "optim.max_steps=8")
    assert "resumed from step 4" in first.stdout, first.stderr
    again = train(cli, folder, start, "optim.max_steps=10")
    assert again.returncode == 0, again.stderr
    assert "resumed from step 8" in again.stdout
    assert steps(folder / "checkpoints") == [6, 8, 10]


def test_a_worker_that_fails_is_restarted_with_resume_never(cli, tmp_path):
    """`never` refuses commits of an earlier run, not those of this one before its restart."""
    folder = tmp_path / "run"
    assert train(cli, folder, "checkpoint.resume=never", "optim.max_steps=4").returncode == 0
    refused = train(cli, folder, "checkpoint.resume=never")
    assert refused.returncode == 2
    assert "holds commits of an earlier run" in refused.stderr
    restarted = train(cli, folder, "checkpoint.resume=never", SLURM_RESTART_COUNT="1")
    assert restarted.returncode == 0, restarted.stderr
    assert "resumed from step 4" in restarted.stdout


@pytest.mark.parametrize(
    "place", ["checkpoints", ".", "checkpoints/mirror", "link", "..", "checkpoints/../checkpoints"]
)
def test_copies_may_not_lie_in_the_folder_that_they_copy(cli, tmp_path, other, place):
    folder = tmp_path / "parent" / "run"
    shutil.copytree(other, folder)
    (folder / "link").symlink_to(folder / "checkpoints")
    before = steps(folder / "checkpoints")
    for command in ("check", "train"):
        done = cli(command, *RUN, f"output_dir={folder}", f"checkpoint.path={folder / place}")
        assert done.returncode == 2, done.stdout
        assert "checkpoint.path=" in done.stderr
        assert "Copies belong elsewhere" in done.stderr
    assert steps(folder / "checkpoints") == before == [2, 4]


def test_two_runs_never_share_a_mirror(cli, tmp_path):
    mirror = f"checkpoint.path={tmp_path / 'mirror'}"
    assert train(cli, tmp_path / "a", mirror, "optim.max_steps=4").returncode == 0
    refused = train(cli, tmp_path / "b", mirror, "optim.lr=1e-3", "optim.max_steps=6")
    assert refused.returncode == 2
    assert f"holds the run of output_dir={tmp_path / 'a'}, not the one in output_dir={tmp_path / 'b'}" in refused.stderr
    assert "Traceback" not in refused.stderr
    checked = cli("check", *RUN, f"output_dir={tmp_path / 'b'}", mirror)
    assert (checked.returncode, checked.stderr) == (2, refused.stderr)
    assert steps(tmp_path / "mirror") == [2, 4]
    assert not (tmp_path / "b/checkpoints").exists()
    shutil.rmtree(tmp_path / "a")
    again = train(cli, tmp_path / "a", mirror, "optim.max_steps=6")
    assert "resumed from step 4" in again.stdout, again.stderr
    assert read_lines(tmp_path / "a/metrics.jsonl")[0]["step"] == 5


def test_a_commit_of_another_run_is_refused(cli, tmp_path, other):
    folder = tmp_path / "run"
    assert train(cli, folder, "optim.max_steps=2").returncode == 0
    shutil.copytree(other / "checkpoints/step-00000004", folder / "checkpoints/step-00000004")
    refused = train(cli, folder)
    assert refused.returncode == 2
    assert "step-00000004: is a commit of another run" in refused.stderr
    assert steps(folder / "checkpoints") == [2, 4]


@pytest.mark.parametrize("damage", ["version", "state", "all"])
def test_commits_that_cannot_be_used_never_become_a_new_run(cli, tmp_path, other, damage):
    folder = tmp_path / "run"
    shutil.copytree(other, folder)
    metrics = (folder / "metrics.jsonl").read_bytes()
    for commit in commits(folder / "checkpoints"):
        if damage == "all":
            (commit.folder / "manifest.json").write_bytes(b"{")
            continue
        state = commit.state()
        files = commit.manifest()["files"]
        if damage == "state":
            state["tokens"] = "many"
            files[STATE] = write_synced(commit.folder / STATE, json.dumps(state))
        write_manifest(commit.folder, commit.step, files)
        if damage == "version":
            reseal_as_version_2(commit)
    before = sorted(path.name for path in (folder / "checkpoints").iterdir() if path.name.startswith("step-"))
    for _ in range(2):
        refused = train(cli, folder)
        assert refused.returncode == 2, refused.stdout
        assert "Traceback" not in refused.stderr
        words = {"version": "format version 2", "state": "tokens: ", "all": "none that can be used"}
        assert words[damage] in refused.stderr
    after = sorted(path.name for path in (folder / "checkpoints").iterdir() if path.name.startswith("step-"))
    assert after == before
    assert (folder / "metrics.jsonl").read_bytes() == metrics


def reseal_as_version_2(commit):
    from ft_dist.checkpoint.commit import format as layout

    files = commit.manifest()["files"]
    content = {"version": 2, "step": commit.step, "files": files}
    write_synced(commit.folder / layout.MANIFEST, json.dumps(content | {"xxh3": layout._own_checksum(content)}))


def test_every_commit_of_a_run_has_its_id(other):
    run_id = json.loads((other / "run.json").read_text())["id"]
    assert {commit.state()["run_id"] for commit in commits(other / "checkpoints")} == {run_id}
