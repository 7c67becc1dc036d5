"""A run's checkpoints are usable as `final/` is: the last step's equals it, and a run need not have finished."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ft_dist.checkpoint.commit import format as layout
from ft_dist.checkpoint.find import commit_of_step
from ft_dist.config.schema import ModelConfig
from ft_dist.engine.digests import persistent_buffers
from ft_dist.errors import CheckpointError, ModelError
from ft_dist.model.builtin import resolve_model
from ft_dist.model.load import load_model
from ft_dist.model.tiny import make_tiny
from ft_dist.result.export import export_run
from ft_dist.result.load import find_weights, load_finished
from ft_dist.result.score import evaluate_path
from tests.conftest import ROOT, SMALL_RUN
from tests.families.architectures import make
from tests.families.multimodal import make_multimodal

SHORT = [*SMALL_RUN, "optim.max_steps=4", "checkpoint.interval_steps=2", "optim.schedule=constant"]
CASES = {
    "new-tokens-bf16": ["model.new_tokens=[<call>,</call>]", "model.dtype=bf16", "engine.zero_stage=2"],
    "dora": ["method.dora=true", "engine.zero_stage=1"],
    "tied-head": ["model.path=tiny-smollm", "method.target_modules=[q_proj,lm_head]", "engine.zero_stage=0"],
    "full-bf16-tied": ["model.path=tiny-gemma2", "method.kind=full", "model.dtype=bf16", "engine.zero_stage=3"],
}


def trained(cli, folder: Path, *settings: str, nproc: int = 2) -> Path:
    done = cli("train", *SHORT, *settings, f"output_dir={folder}", "--nproc", str(nproc))
    assert done.returncode == 0, done.stderr
    return folder


def content(folder: Path) -> dict[str, object]:
    """Every tensor, with its dtype, and every JSON file of a saved model."""
    found: dict[str, object] = {}
    for path in folder.iterdir():
        if path.suffix == ".safetensors":
            found |= {name: (str(tensor.dtype), tensor.tolist()) for name, tensor in load_file(path).items()}
        elif path.suffix == ".json":
            tree = json.loads(path.read_text())
            for key in ("target_modules", "target_parameters"):
                if isinstance(tree.get(key), list):
                    tree[key].sort()  # saved in the order of a set
            found[path.name] = tree
    return found


def with_whole_routers(folder: Path) -> list[str]:
    """Routers that train whole have buffers: their correction bias."""
    return [f"model.path={make('deepseek_v3', folder, dtype=torch.bfloat16)}", "method.modules_to_save=gate"]


def multimodal(folder: Path) -> list[str]:
    """Its vision tower is frozen, and part of final/."""
    return [f"model.path={make_multimodal('gemma3', folder)}", "method.kind=full"]


MADE = {"whole-router": with_whole_routers, "multimodal": multimodal}


@pytest.mark.parametrize("case", [*CASES, *MADE])
def test_the_last_step_equals_final(cli, tmp_path, case):
    settings = MADE[case](tmp_path / "model") if case in MADE else CASES[case]
    run = trained(cli, tmp_path / "run", *settings)
    final = content(run / "final")
    kind = "adapter" if find_weights(str(run)).base else "merged"
    export_run(run, kind=kind, to=tmp_path / "whole", step=4)
    assert content(tmp_path / "whole") == final
    export_run(run, kind=kind, to=tmp_path / "half", step=2)
    half = content(tmp_path / "half")
    assert half.keys() == final.keys()
    assert half != final
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_an_unfinished_run_is_merged_scored_and_chats_at_a_step(cli, tmp_path):
    run = trained(cli, tmp_path / "run", "optim.max_steps=2", nproc=1)
    export_run(run, kind="merged", to=tmp_path / "finished")
    eval_file = ["configs/emails/test.jsonl"]
    score = evaluate_path(str(run), eval_file, max_samples=4, max_new_tokens=1)
    (run / "final").rename(run / "hidden")
    trained_further = trained(cli, run, nproc=1)
    (trained_further / "final").rename(run / "hidden-too")
    with pytest.raises(ModelError, match=r"has not finished.*--step"):
        find_weights(str(run))
    export_run(run, kind="merged", to=tmp_path / "step", step=2)
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("finished", "step"))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    assert evaluate_path(str(run), eval_file, step=2, max_samples=4, max_new_tokens=1) == score
    assert evaluate_path(str(run), eval_file, step=4, max_samples=4, max_new_tokens=1).loss != score.loss
    answered = cli("chat", str(run), "--step", "2", "--prompt", "Hello", "--max-new-tokens", "2")
    assert answered.returncode == 0, answered.stderr


def with_files_of(limit: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`ft-dist ARGUMENTS` on a machine that cannot write files of more than `limit` bytes."""
    code = (
        "import resource, runpy, sys\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "runpy.run_module('ft_dist.cli', run_name='__main__', alter_sys=True)"
    )
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_a_full_disk_is_one_line(cli, tmp_path):
    """A small adapter, so that one of the limits lets it pass and stops the tokenizer."""
    run = trained(cli, tmp_path / "run", "method.rank=1", "method.target_modules=[q_proj]", nproc=1)
    size = (run / "final/tokenizer.json").stat().st_size
    assert all(path.stat().st_size < size for path in (run / "final").iterdir() if path.name != "tokenizer.json")
    for limit in (1024, size - 1):
        for arguments in (["eval", str(run)], ["export", str(run), str(tmp_path / "out")]):
            done = with_files_of(limit, *arguments, "--step", "2")
            assert done.returncode == 2, done.stderr
            [line] = done.stderr.strip().splitlines()
            assert "cannot be written (" in line
            assert "File too large" in line
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_full_model_keeps_what_only_the_base_has():
    """Persistent buffers are not parameters, so a commit does not hold them."""
    model = load_model(ModelConfig(path="tiny-llama"), folder=resolve_model("tiny-llama"), vocabulary=1).model
    assert dict(persistent_buffers(model)) == {}
    model.model.layers[0].register_buffer("layer_scalar", torch.tensor([3.0]))
    assert dict(persistent_buffers(model)) == {"model.layers.0.layer_scalar": torch.tensor([3.0])}


def test_mistakes_are_explained(cli, tmp_path):
    run, out = trained(cli, tmp_path / "run", nproc=1), tmp_path / "out"
    for step, message in (("3", "holds no checkpoint of step 3, only steps 2, 4."), ("last", "--step=last: should be")):
        done = cli("export", str(run), str(out), "--step", step)
        assert done.returncode == 2
        assert message in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    with pytest.raises(CheckpointError, match=r"\(steps 2, 4\) was evaluated.*The run evaluated no step\."):
        load_finished(str(run), step="best")
    with pytest.raises(ModelError, match=f"{run} --step 4"):
        find_weights(str(run / "checkpoints" / "step-00000004"))
    with pytest.raises(ModelError, match="not a run folder"):
        load_finished("tiny-llama", step=4)
    file = run / "checkpoints" / "step-00000002" / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=str(file)):
        export_run(run, kind="merged", to=out, step=2)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("tiny-llama", "tiny-smollm"))
    with pytest.raises(CheckpointError, match="weights differ"):
        export_run(run, kind="merged", to=out, step=4)
    assert not out.exists()


def test_an_adapter_stays_with_its_base(cli, tmp_path):
    base = tmp_path / "base"
    make_tiny("tiny-llama", base)
    run = trained(cli, tmp_path / "run", f"model.path={base}", nproc=1)
    export_run(run, kind="merged", to=tmp_path / "merged")
    weights = {name: tensor * 1.5 for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    difference = f"its weights differ from those of {base} (model.safetensors)"
    refusal = f"model.path={base}: {difference}, on which the adapter in {run / 'final'} was"
    for command in (["export", str(run), str(tmp_path / "out")], ["chat", str(run), "--prompt", "Hello"]):
        done = cli(*command)
        assert done.returncode == 2, done.stderr
        [line] = done.stderr.strip().splitlines()
        assert refusal in line
    assert not (tmp_path / "out").exists()
    summary = run / "summary.json"
    tree = json.loads(summary.read_text())
    del tree["base"]  # as older versions wrote it
    summary.write_text(json.dumps(tree))
    assert find_weights(str(run)).base == str(base)


def commit(root: Path, step: int, losses: dict[int, float | None]) -> None:
    folder = layout.step_folder(root, step)
    folder.mkdir(parents=True)
    state = json.dumps({"step": step, "held_out_losses": losses})
    layout.write_manifest(folder, step, {layout.STATE: layout.write_synced(folder / layout.STATE, state)})


def test_best_is_the_lowest_loss_that_has_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint yet"):
        commit_of_step(tmp_path, "best")
    losses: dict[int, float | None] = {0: 0.1}
    for step, loss in ((2, 0.9), (4, 0.5), (6, None), (8, 0.5)):
        losses[step] = loss
        if step != 2:
            commit(tmp_path, step, losses)
    assert commit_of_step(tmp_path, "best").step == 4  # of equals the earlier; steps 0 and 2 have no checkpoint
    layout.remove(tmp_path, 4)
    assert commit_of_step(tmp_path, "best").step == 8
    layout.remove(tmp_path, 8)
    with pytest.raises(CheckpointError, match=r"\(step 6\) was evaluated.*evaluated steps 0, 2, 4, 6\."):
        commit_of_step(tmp_path, "best")
