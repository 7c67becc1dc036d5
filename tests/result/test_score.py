"""`ft-dist eval` on a model folder and on a run: the loss equals transformers', and mistakes are reported."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ft_dist.config.load import dump_config, validate
from ft_dist.errors import ConfigError, DataError, ModelError
from ft_dist.model.tiny import make_tiny
from ft_dist.result.load import load_finished
from ft_dist.result.score import evaluate_path, table

ROWS = [("Where is my parcel?", "order"), ("You won a prize!", "spam"), ("The app crashes.", "support")]


@pytest.fixture
def model(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("FT_DIST_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    make_tiny("tiny-llama", folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "test.jsonl"
    rows = [[{"role": "user", "content": user}, {"role": "assistant", "content": said}] for user, said in ROWS]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return path


def expected_loss(folder: Path, count: int) -> tuple[float, int]:
    """Directly from transformers: labels on the answer and its end token."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    total, tokens = 0.0, 0
    for user, said in ROWS[:count]:
        prompt = f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer(f"{prompt}{said}<|im_end|>\n", return_tensors="pt").input_ids
        labels = ids.clone()
        labels[:, : len(tokenizer(prompt).input_ids)] = -100
        labels[:, -1] = -100  # the newline after the end token
        labelled = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            total += float(model(ids, labels=labels).loss) * labelled
        tokens += labelled
    return total / tokens, tokens


@pytest.mark.parametrize("max_samples", [None, 2])
def test_a_model_folder(model: Path, data: Path, max_samples: int | None) -> None:
    lines: list[str] = []
    scores = evaluate_path(
        str(model), [str(data)], max_new_tokens=3, max_samples=max_samples, batch_rows=2, progress=lines.append
    )
    loss, tokens = expected_loss(model, max_samples or 3)
    assert scores.loss == pytest.approx(loss, rel=1e-5)
    assert (scores.labelled_tokens, scores.answered) == (tokens, max_samples or 3)
    assert scores.accuracy == 0.0
    assert lines[-1] == f"answered {scores.answered} of {scores.answered}"
    assert "Where is my parcel?" in table(scores)


def test_a_run_brings_its_own_data_and_needs_it(model: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    tree = {
        "model": {"path": str(model), "dtype": "fp32"},
        "method": {"kind": "full"},
        "data": {"train": [str(data)], "eval": [str(data)]},
        "output_dir": str(run),
    }
    (run / "config.yaml").write_text(dump_config(validate(tree)))
    model.rename(run / "final")
    assert evaluate_path(str(run), [], max_new_tokens=2).loss == pytest.approx(
        expected_loss(run / "final", 3)[0], rel=1e-5
    )
    with pytest.raises(ConfigError, match="--data"):
        evaluate_path(str(run / "final"), [])
    with pytest.raises(DataError, match=r"absent\.jsonl"):
        evaluate_path(str(run), [str(tmp_path / "absent.jsonl")])


def test_a_model_without_some_of_its_weights_is_refused(model: Path, data: Path) -> None:
    """transformers would fill the second layer with random numbers, as training knows."""
    file = model / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if "layers.1." not in name}, file)
    with pytest.raises(ModelError, match=rf"{model}: has no weights for model\.layers\.1\..*would start random"):
        evaluate_path(str(model), [str(data)])
    with pytest.raises(ModelError, match="would start random"):
        load_finished(str(model))
