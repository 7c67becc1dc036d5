"""Code in the folder of a model or run runs only if the caller of the command says so, whatever its config says."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ft_dist.errors import ModelError
from ft_dist.model.builtin import fetch
from ft_dist.result.chat import chat
from ft_dist.result.export import export_run
from ft_dist.result.load import find_weights
from ft_dist.result.score import evaluate_path
from tests.conftest import SMALL_RUN, start_cli

CODE = """
import os, pathlib
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

pathlib.Path(os.environ["MARKER"]).touch()

class OwnConfig(LlamaConfig):
    model_type = "own_model"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def with_code(folder: Path, *, of: str) -> Path:
    """A copy of tiny-llama whose model or tokenizer needs code from the folder."""
    shutil.copytree(fetch("tiny-llama"), folder)
    (folder / "own.py").write_text(CODE)
    if of == "model":
        file, more = folder / "config.json", {"model_type": "own_model", "architectures": ["OwnForCausalLM"]}
        mapped = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    else:
        file, more = folder / "tokenizer_config.json", {"tokenizer_class": "OwnTokenizer"}
        mapped = {"AutoTokenizer": [None, "own.OwnTokenizer"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | more | {"auto_map": mapped}))
    return folder


@pytest.fixture(scope="module", params=["lora-model", "full-model", "lora-tokenizer"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of somebody who trusted the code, as its own config says."""
    folder = tmp_path_factory.mktemp(request.param)
    method, _, of = request.param.partition("-")
    base = with_code(folder / "base", of=of)
    settings = [f"model.path={base}", "model.trust_remote_code=true", f"method.kind={method}", "optim.max_steps=1"]
    options = ["evaluate.before=false", f"output_dir={folder / 'run'}", "--nproc", "1"]
    process = start_cli("train", *SMALL_RUN, *settings, *options, **own_cache(folder, folder / "trusted"))
    out, err = process.communicate()
    assert process.returncode == 0, out + err
    assert (folder / "trusted").exists()
    assert "trust_remote_code: true" in (folder / "run" / "config.yaml").read_text()
    return folder / "run"


def own_cache(folder: Path, marker: Path) -> dict[str, str]:
    return {"MARKER": str(marker), "HF_HOME": str(folder / "home")}


@pytest.mark.faults
@pytest.mark.parametrize("step", [None, 1])
@pytest.mark.parametrize("place", ["run", "final"])
def test_nothing_that_opens_a_run_obeys_its_own_config(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, step: int | None
) -> None:
    """Modules imported here would touch the marker, because no test of this process trusts the code."""
    monkeypatch.setenv("MARKER", str(tmp_path / "marker"))
    opened = str(run if place == "run" else run / "final")
    if place == "final" and step:
        pytest.skip("only a run has steps")
    commands: list[Callable[[], object]] = [
        lambda: chat(opened, step=step, prompt="hello"),
        lambda: evaluate_path(opened, ["configs/emails/test.jsonl"], step=step),
        lambda: export_run(opened, kind="merged", to=tmp_path / "out", step=step),
    ]
    if "full" in str(run) and step is None:
        del commands[-1]  # it copies the files, and loads nothing
    for command in commands:
        with pytest.raises(ModelError, match=r"needs Python code from there.* pass --trust-remote-code") as error:
            command()
        assert "\n" not in str(error.value)
        assert not (tmp_path / "marker").exists()
        assert not (tmp_path / "out").exists()


@pytest.mark.faults
def test_the_flag_lets_the_code_run(run: Path, tmp_path: Path) -> None:
    data = Path("configs/emails/test.jsonl").absolute()
    short = ["--max-new-tokens", "2"]
    for number, words in enumerate(
        (
            ["chat", str(run), "--prompt", "hello", *short],
            ["eval", str(run), "--data", str(data), "--max-samples", "1", *short],
            ["export", str(run), str(tmp_path / "out"), "--step", "1"],
        )
    ):
        marker = tmp_path / f"marker-{number}"
        process = start_cli(*words, "--trust-remote-code", **own_cache(tmp_path, marker))
        out, err = process.communicate()
        assert process.returncode == 0, out + err
        assert marker.exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"megatron_config": {"a": 1}, "megatron_core": "own"}, "megatron_config: Input should be null"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path: Input should be a valid string"),
        ({"base_model_name_or_path": None}, "has no base_model_name_or_path"),
        ({"base_model_name_or_path": "../../x"}, r"model\.path=\.\./\.\./x: no such folder"),
    ],
)
def test_the_config_of_an_adapter_is_checked(tmp_path: Path, change: dict[str, object], message: str) -> None:
    tree = {"peft_type": "LORA", "base_model_name_or_path": "tiny-llama"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(tree | change))
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(ModelError, match=message):
        find_weights(str(tmp_path))


def test_no_pickled_weights_are_loaded(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "tiny-llama"}')
    (tmp_path / "adapter_model.bin").write_bytes(os.urandom(64))
    with pytest.raises(ModelError, match=r"no adapter_model\.safetensors"):
        find_weights(str(tmp_path))
