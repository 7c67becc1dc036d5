"""Models of the hub: what `check` downloads, and a run on a model that is in the hub's cache."""

import json
import shutil

from ft_dist.model.tiny import make_tiny
from tests.families.multimodal import make_multimodal
from tests.hub import COMMIT, hub

QUICK = ["data.eval=[]", "optim.max_steps=1", "checkpoint.interval_steps=0"]


def weights_asked_for(served) -> list[str]:
    return [request for request in served.requests if "safetensors" in request]


def test_check_downloads_weights_only_for_its_model_option(cli, tmp_path):
    repository = tmp_path / "repository"
    repository.mkdir()
    make_tiny("tiny-llama", repository)
    with hub(repository, "org/tiny", kind="models") as served:
        own = {**served.environment, "HF_HOME": str(tmp_path / "home")}
        settings = ["smoke", "model.path=org/tiny", f"output_dir={tmp_path / 'run'}"]
        plain = cli("check", *settings, **own)
        assert plain.returncode == 0, plain.stderr
        assert "model: org/tiny from the hub; its weights are not on this machine yet" in plain.stdout
        refused = cli("check", *settings, "method.target_modules=q_prok", **own)
        assert refused.returncode == 2
        assert "Did you mean q_proj?" in refused.stderr
        assert not weights_asked_for(served)
        whole = cli("check", *settings, "--model", **own)
        assert whole.returncode == 0, whole.stderr
        assert "org/tiny: downloading 0.0 GiB of weights from the hub" in whole.stderr
        assert "self-check" in whole.stdout
        assert weights_asked_for(served)


def test_weights_that_do_not_fit_here_are_not_downloaded(cli, tmp_path):
    repository = tmp_path / "repository"
    repository.mkdir()
    make_tiny("tiny-llama", repository)
    sizes = json.loads((repository / "config.json").read_text())
    (repository / "config.json").write_text(json.dumps(sizes | {"intermediate_size": 10**11}))
    with hub(repository, "org/huge", kind="models") as served:
        own = {**served.environment, "HF_HOME": str(tmp_path / "home")}
        done = cli("check", "smoke", "--model", "model.path=org/huge", f"output_dir={tmp_path / 'run'}", **own)
        assert done.returncode == 0, done.stderr
        assert not weights_asked_for(served)
    assert "model: not loaded by --model: its weights take 71525.6 GiB" in done.stdout
    assert "a run checks loss, isolation and gradients itself when it starts" in done.stdout


def test_a_cached_model_is_known_like_a_folder(cli, tmp_path):
    """Its other parts are named, and a commit holds the digest of its weights; the adapter names the hub."""
    cached, run = tmp_path / "home/hub/models--org--seeing", tmp_path / "run"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs/main").write_text(COMMIT)
    shutil.copytree(make_multimodal("qwen3_5", tmp_path / "model"), cached / "snapshots" / COMMIT)
    settings = ["smoke", "model.path=org/seeing", "model.dtype=fp32", f"output_dir={run}"]
    own = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    checked = cli("check", *settings, **own)
    assert "only the text model is trained, not visual" in checked.stdout, checked.stderr
    done = cli("train", *settings, *QUICK, "--nproc", "1", **own)
    assert done.returncode == 0, done.stderr
    assert "only the text model is trained, not visual" in done.stdout
    assert "final/ leaves out: visual (Qwen3_5ForCausalLM" in done.stdout
    [state] = run.glob("checkpoints/*/state.json")
    assert json.loads(state.read_text())["base"]["digest"]
    adapter = json.loads((run / "final/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "org/seeing"


def test_a_run_stays_at_the_commit_that_it_began_with(cli, tmp_path):
    """The hub's main moves on while the run is preempted; the weights there are others now."""
    repository, run = tmp_path / "repository", tmp_path / "run"
    repository.mkdir()
    make_tiny("tiny-llama", repository)
    settings = ["smoke", "model.path=org/tiny", f"output_dir={run}", *QUICK, "--nproc", "1"]
    with hub(repository, "org/tiny", kind="models") as served:
        own = {**served.environment, "HF_HOME": str(tmp_path / "home")}
        first = cli("train", *settings, **own)
        assert first.returncode == 0, first.stderr
        assert json.loads((run / "run.json").read_text())["model_commit"] == COMMIT
        served.commit = COMMIT[::-1]
        weights = repository / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        again = cli("train", *settings, "optim.max_steps=2", **own)
    assert again.returncode == 0, again.stderr
    assert "resumed from step 1" in again.stdout
    [_, newest] = sorted(run.glob("checkpoints/*/state.json"))
    assert json.loads(newest.read_text())["base"]["commit"] == COMMIT
