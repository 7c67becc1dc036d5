"""The run folder's contract on the smoke recipe: files, their fields, and their consistency."""

import json
import os
import pty
import subprocess
import sys

import pytest
import torch

from tests.conftest import CLI, ROOT, read_lines
from tests.ports import free_port

METRICS = {
    "step",
    "loss",
    "lr",
    "grad_norm",
    "labelled_tokens",
    "real_tokens",
    "padded_tokens",
    "computed_tokens",
    "tokens_per_s",
    "step_s",
    "data_wait_s",
    "checkpoint_stall_s",
    "peak_memory_bytes",
    "epoch",
    "samples_seen",
}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A finished smoke run with two ranks, wandb offline and TensorBoard; its folder and its output."""
    folder = tmp_path_factory.mktemp("smoke") / "run"
    command = [sys.executable, "-m", "ft_dist.cli", "train", "smoke", f"output_dir={folder}", "--nproc", "2"]
    settings = ["observe.wandb=offline", "observe.tensorboard=true", "evaluate.generate=true", "optim.epochs=1"]
    done = subprocess.run([*command, *settings], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done


def test_a_normal_run_has_no_warnings(smoke):
    _, done = smoke
    assert done.stderr == ""
    assert "Warning" not in done.stdout


def test_metrics_have_their_fields_and_their_parts_fill_the_loop(smoke):
    folder, _ = smoke
    lines = read_lines(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert all(set(line) == METRICS for line in lines)
    parts = sum(line["step_s"] + line["data_wait_s"] + line["checkpoint_stall_s"] for line in lines[1:])
    for line in lines:
        seconds = line["real_tokens"] / line["tokens_per_s"]
        assert seconds == pytest.approx(line["step_s"] + line["data_wait_s"], rel=1e-3)
    events = {event["event"]: event for event in read_lines(folder / "events.jsonl")}
    assert parts < events["end"]["time"] - events["start"]["time"]


def test_the_parts_of_the_loop_are_its_wall_time(smoke):
    folder, _ = smoke
    lines = read_lines(folder / "metrics.jsonl")
    events = read_lines(folder / "events.jsonl")
    loop_starts = next(e["time"] for e in events if e.get("when") == "before")
    loop_ends = next(e["time"] for e in events if e["event"] == "saved" and e["step"] == 12)
    parts = sum(line["step_s"] + line["data_wait_s"] + line["checkpoint_stall_s"] for line in lines)
    parts += next(e["seconds"] for e in events if e["event"] == "saved" and e["step"] == 12)
    # half a second of a loop of four: a busy machine may run other processes between the parts
    assert parts == pytest.approx(loop_ends - loop_starts, rel=0.1, abs=0.5)


def test_summary_holds_both_scores(smoke):
    folder, _ = smoke
    summary = json.loads((folder / "summary.json").read_text())
    for when in ("before", "after"):
        assert 0 <= summary[when]["accuracy"] <= 1
        assert summary[when]["answered"] == 16
    assert summary["after"]["loss"] < summary["before"]["loss"]
    assert summary["steps"] == 12


def test_final_loads_in_plain_peft(smoke):
    import peft
    from transformers import AutoTokenizer

    folder, _ = smoke
    model = peft.AutoPeftModelForCausalLM.from_pretrained(str(folder / "final"))
    tokenizer = AutoTokenizer.from_pretrained(str(folder / "final"))
    ids = tokenizer("Hello", return_tensors="pt")
    assert torch.isfinite(model(**ids).logits).all()


def test_trackers_wrote_offline(smoke):
    folder, _ = smoke
    assert list(folder.glob("wandb/offline-run-*"))
    assert list((folder / "tensorboard").iterdir())


def test_no_pickle_is_written(smoke):
    folder, _ = smoke
    kinds = {path.suffix for path in folder.rglob("*") if path.is_file() and "wandb" not in path.parts}
    assert kinds <= {".safetensors", ".json", ".jsonl", ".yaml", ".log", ".jinja", ".md", ".0", ".lock", ""}


def test_a_finished_run_started_again_stays_finished(smoke, cli):
    folder, _ = smoke
    before = (folder / "metrics.jsonl").read_text()
    done = cli("train", str(folder / "config.yaml"), "--nproc", "1")
    assert done.returncode == 0, done.stderr
    assert (folder / "metrics.jsonl").read_text() == before


def test_torchrun_gives_the_same_run(cli, tmp_path):
    overrides = ["smoke", "optim.max_steps=3", "data.eval=[]"]
    options = f"--nproc-per-node 2 --master-port {free_port()}"
    torchrun = [sys.executable, "-m", "torch.distributed.run", *options.split()]
    command = [*torchrun, "-m", "ft_dist.train", *overrides, f"output_dir={tmp_path / 'a'}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert cli("train", *overrides, f"output_dir={tmp_path / 'b'}", "--nproc", "2").returncode == 0
    runs = [[(x["loss"], x["grad_norm"]) for x in read_lines(tmp_path / r / "metrics.jsonl")] for r in "ab"]
    assert runs[0] == runs[1]


def test_help_imports_nothing_heavy():
    code = "import sys, ft_dist.cli.app; print({'torch', 'transformers', 'pydantic', 'datasets'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_verbs_work_on_a_finished_run(smoke, cli, tmp_path):
    folder, _ = smoke
    scores = cli("eval", str(folder), "--max-samples", "16", "--max-new-tokens", "4", "--json")
    assert scores.returncode == 0, scores.stderr
    summary = json.loads((folder / "summary.json").read_text())
    assert json.loads(scores.stdout)["loss"] == pytest.approx(summary["after"]["loss"], rel=2e-2)
    answer = cli("chat", str(folder), "--prompt", "Hello", "--max-new-tokens", "8")
    assert answer.returncode == 0, answer.stderr
    merged = cli("export", str(folder), str(tmp_path / "merged"))
    assert merged.returncode == 0, merged.stderr
    plain = "import sys; from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1]); "
    plain += "assert not any(name.startswith('ft_dist') for name in sys.modules)"
    subprocess.run([sys.executable, "-c", plain, str(tmp_path / "merged")], check=True, cwd=tmp_path)
    again = cli("export", str(folder), str(tmp_path / "merged"))
    assert again.returncode == 2
    assert "exists and is not an empty folder" in again.stderr


def test_check_marks_what_a_sample_teaches(cli, tmp_path):
    lines = cli("check", "smoke", f"output_dir={tmp_path}").stdout.splitlines()
    assert any("the first 64 records give 64 samples of 188 tokens on average, 4% labelled" in line for line in lines)
    assert "  | [[invoice<|im_end|>]]" in lines
    assert lines[-1] == "ready to train"
    assert list(tmp_path.iterdir()) == []
    main, terminal = pty.openpty()
    subprocess.run([*CLI, "check", "smoke", f"output_dir={tmp_path}"], cwd=ROOT, stdout=terminal, check=True)
    os.close(terminal)
    assert b"\x1b[1;32minvoice<|im_end|>\x1b[0m" in os.read(main, 1 << 16)
    os.close(main)


def test_check_and_schema_print_json(cli):
    facts = json.loads(cli("check", "smoke", "--json").stdout)
    assert facts["ok"]
    assert any("format chat, 480 samples" in fact for fact in facts["facts"])
    assert [one["kind"] for one in facts["data"]] == ["train", "eval"]
    assert {"learnt": True, "text": "invoice<|im_end|>"} in facts["data"][0]["sample"]
    assert json.loads(cli("schema").stdout)["additionalProperties"] is False
