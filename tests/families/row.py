"""One architecture through the product: check, train, evaluate, export. Transformers and peft give the true loss."""

import contextlib
import io
import json
import math
import os
import pickle
import re
import shutil
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from tests.families.architectures import make

TOLERANCE = 2e-5
"""Relative difference of two fp32 losses that sums in another order explain"""
NOTED = ("self-check", "left out", "own row", "transformers changes")
STEPS = 2
ROWS = 3
METHODS: dict[str, list[str]] = {
    "lora": ["method.kind=lora", "method.rank=4", "optim.lr=0.02"],
    "full": ["method.kind=full", "optim.lr=0.003"],
}
SETTINGS = [
    "model.dtype=fp32",
    "data.max_length=256",
    "data.log_samples=true",
    f"batch.global_rows={ROWS}",
    f"optim.max_steps={STEPS}",
    "optim.epochs=2",
    "checkpoint.interval_steps=0",
]


@dataclass
class Row:
    """What happened to one architecture with one method."""

    model_type: str
    method: str
    refusal: str = ""
    """The error of `check`, the same as that of `train`"""
    separation: str = ""
    trained: str = ""
    """The share of each kind of part that trains"""
    notes: list[str] = field(default_factory=list)
    differences: dict[str, float] = field(default_factory=dict)
    """Relative differences of losses that must be equal"""
    warning: str = ""
    """The run's own line on a difference between `final/` and the trained model"""
    wrong: list[str] = field(default_factory=list)

    @property
    def right(self) -> bool:
        return not self.wrong

    def compare(self, name: str, ours: float | None, truth: float) -> None:
        difference = math.inf if ours is None else abs(ours - truth) / abs(truth)
        self.differences[name] = difference
        if not difference <= TOLERANCE and not (self.warning and "final" in name):
            self.wrong.append(f"{name}: {ours} instead of {truth:.6f}")


def rows_of(model_type: str, folder: Path, methods: list[str]) -> list[Row]:
    """Build the architecture in `folder` and run it with each method; an exception becomes a wrong row."""
    model = folder / "model"
    try:
        make(model_type, model)
    except Exception as error:
        return [Row(model_type, "-", wrong=[f"cannot be built: {type(error).__name__}: {error}"])]
    rows = []
    for method in methods:
        row = Row(model_type, method)
        try:
            _run(row, model, folder / method)
        except Exception:
            row.wrong.append("traceback: " + traceback.format_exc().strip().splitlines()[-1])
            row.notes.append(traceback.format_exc())
        rows.append(row)
    return rows


def _run(row: Row, model: Path, place: Path) -> None:
    place.mkdir(parents=True)
    data = _write_data(place)
    config = place / "config.yaml"
    config.write_text(
        json.dumps(
            {
                "model": {"path": str(model)},
                "data": {
                    "train": str(data / "train.jsonl"),
                    "eval": str(data / "eval.jsonl"),
                    "cache_dir": str(place / "cache"),
                },
                "output_dir": str(place / "run"),
            }
        )
    )
    arguments = [str(config), *SETTINGS, *METHODS[row.method]]
    checked = in_child(_call_check, arguments)
    code, output = in_child(_call_train, arguments)
    if code == 2:
        error = output.strip().splitlines()[-1]
        row.refusal = re.sub(r"^(ft-dist: )?(error: )?", "", error)
        if checked is None:
            row.wrong.append(f"train refuses what check accepts: {row.refusal}")
        elif checked not in row.refusal and row.refusal not in checked:
            row.wrong.append(f"check says: {checked}; train says: {row.refusal}")
        return
    if checked is not None:
        row.wrong.append(f"check refuses what train accepts: {checked}")
    if code:
        row.wrong.append(f"train exits with {code}: {output.strip().splitlines()[-1]}")
        row.notes.append(output)
        return
    row.notes += [
        line for line in output.splitlines() if "self-check" in line or "left out" in line or "own row" in line
    ]
    if shares := re.search(r"parameters train \((.*?)\)", output):
        row.trained = shares[1]
    else:
        row.wrong.append("no self-check")
    row.warning = next((line for line in output.splitlines() if "transformers changes" in line), "")
    _compare(row, model, place, data)


def _compare(row: Row, model: Path, place: Path, data: Path) -> None:
    run = place / "run"
    summary = json.loads((run / "summary.json").read_text())
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    base = _load(model)
    held_out = _encoded(data / "eval.jsonl", model)
    train = _encoded(data / "train.jsonl", model)
    row.separation = "packed" if metrics[0]["samples_seen"] > ROWS else "one a row"
    row.compare("untrained, held-out", summary["before"]["loss"], _loss(base, held_out))
    first = [train[index] for row_ids in samples[0]["rows"] for index in row_ids]
    row.compare("first step, packed", metrics[0]["loss"], _loss(base, first))
    trained = summary["after"]["loss"]
    if abs(trained - summary["before"]["loss"]) < 1e-4:
        row.wrong.append(f"training changed nothing: {trained}")
    if row.method == "lora":
        import peft

        adapted = peft.PeftModel.from_pretrained(_load(model), run / "final").eval()
        row.compare("adapter by peft", trained, _loss(adapted, held_out))
        _quietly_export(run, place / "merged")
        row.compare("merged", trained, _loss(_load(place / "merged"), held_out))
    else:
        row.compare("final by transformers", trained, _loss(_load(run / "final"), held_out))


def _write_data(place: Path) -> Path:
    words = ["red", "green", "blue", "stone", "river", "cloud", "ember", "frost", "maple", "onyx"]
    for name, count in (("train", 24), ("eval", 6)):
        with (place / f"{name}.jsonl").open("w") as file:
            for number in range(count):
                question = " ".join(words[(number * step + len(name)) % 10] for step in range(1, 2 + number % 4))
                answer = words[(number * 7 + 3) % 10]
                turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                file.write(json.dumps({"messages": turns}) + "\n")
    return place


def in_child(function: Callable[[list[str]], Any], arguments: list[str]) -> Any:
    """The result of `function(arguments)` in a forked process: DeepSpeed starts once in each, imports are shared."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            content = pickle.dumps(function(arguments))
        except BaseException:
            content = pickle.dumps(traceback.format_exc())
        with os.fdopen(writes, "wb") as pipe:
            pipe.write(content)
        os._exit(0)
    os.close(writes)
    with os.fdopen(reads, "rb") as pipe:
        content = pipe.read()
    os.waitpid(child, 0)
    result = pickle.loads(content)
    if isinstance(result, str) and result.startswith("Traceback"):
        raise RuntimeError(result)
    return result


def _call_check(arguments: list[str]) -> str | None:
    """The error of `ft-dist check --model`, or None."""
    from ft_dist.check import check, check_data
    from ft_dist.config import load_config
    from ft_dist.errors import UserError
    from ft_dist.run.proof.check_model import check_model

    try:
        config = load_config(arguments[0], arguments[1:])
        check(config, world_size=1)
        check_data(config)
        check_model(config, weights=True)
    except UserError as error:
        return str(error)
    return None


def _call_train(arguments: list[str]) -> tuple[int, str]:
    from ft_dist.train import main

    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = main(arguments)
    return code, output.getvalue()


def _quietly_export(run: Path, to: Path) -> None:
    from ft_dist.result.export import export_run

    shutil.rmtree(to, ignore_errors=True)
    with contextlib.redirect_stdout(io.StringIO()):
        export_run(run, kind="merged", to=to)


def _load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _encoded(file: Path, model: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(token ids, labelled) of each conversation: ChatML, with the answer and its end labelled."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    found = []
    for line in file.read_text().splitlines():
        turns = json.loads(line)["messages"]
        ids = tokenizer.apply_chat_template(turns, tokenize=False)
        prompt = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
        tokens = torch.tensor(tokenizer(ids, add_special_tokens=False)["input_ids"])
        start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        labelled = torch.arange(len(tokens)) >= start
        labelled[-1] = False  # the line break after the end of the turn
        found.append((tokens, labelled))
    return found


@torch.no_grad()
def _loss(model: Any, samples: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Mean loss per labelled token, each sample alone, by the model's own forward."""
    total = count = 0.0
    for tokens, labelled in samples:
        logits = model(input_ids=tokens[None], use_cache=False).logits[0, :-1].float()
        total += float(F.cross_entropy(logits[labelled[1:]], tokens[1:][labelled[1:]], reduction="sum"))
        count += int(labelled[1:].sum())
    return total / count
