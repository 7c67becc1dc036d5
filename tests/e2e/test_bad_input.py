"""Every user error is reported in one line, with exit code 2, before anything is written."""

import json
from pathlib import Path

import pytest

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


def write(folder: Path, *lines: str) -> Path:
    path = folder / "train.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


@pytest.fixture
def refused(cli, tmp_path):
    """Train with these overrides. The run must be refused; returns the error line."""

    def run(*overrides: str, nproc: int = 1) -> str:
        output = tmp_path / "run"
        done = cli("train", "smoke", f"output_dir={output}", *overrides, "--nproc", str(nproc))
        assert done.returncode == 2, done.stdout + done.stderr
        assert "Traceback" not in done.stderr + done.stdout
        assert not output.exists()
        lines = done.stderr.strip().splitlines()
        assert len(lines) == 1, lines
        return lines[0]

    return run


def test_an_unknown_key_suggests_the_nearest(refused):
    assert "unknown key. Did you mean optim.warmup_steps?" in refused("optim.warmup_step=3")


def test_wrong_type(refused):
    assert 'batch.global_rows="many"' in refused("batch.global_rows=many")


def test_missing_model(refused):
    assert "model.path=./no/such/model: no such folder" in refused("model.path=./no/such/model")


def test_an_unreachable_hub_id_is_reported_once(refused):
    assert "model.path=nobody/nothing" in refused("model.path=nobody/nothing", nproc=2)


def test_missing_data_file(refused):
    assert "nowhere.jsonl" in refused("data.train=[{path: nowhere.jsonl}]")


def test_empty_data(refused, tmp_path):
    path = write(tmp_path)
    assert str(path) in refused(f"data.train=[{path}]")


def test_broken_json_names_file_and_line(refused, tmp_path):
    path = write(tmp_path, json.dumps(CHAT), json.dumps(CHAT), '{"messages": [')
    assert f"{path} line 3" in refused(f"data.train=[{path}]")


def test_sample_without_an_assistant_turn(refused, tmp_path):
    path = write(tmp_path, json.dumps(CHAT), json.dumps({"messages": CHAT["messages"][:1]}))
    message = refused(f"data.train=[{path}]")
    assert f"{path} line 2" in message
    assert "assistant" in message


def test_unknown_format(refused, tmp_path):
    path = write(tmp_path, json.dumps({"question": "?", "reply": "!"}))
    assert "question" in refused(f"data.train=[{path}]")


def test_zero_stage_7(refused):
    assert "engine.zero_stage=7: should be 'auto', 0, 1, 2 or 3" in refused("engine.zero_stage=7")


def test_a_target_module_without_a_match(refused):
    message = refused("method.target_modules=[q_prok]")
    assert "method.target_modules=q_prok" in message
    assert "q_proj" in message


@pytest.mark.parametrize(
    "override, message",
    [
        ("method.target_modules=[]", "method.target_modules: [] names no layer; use all-linear, or list"),
        ("method.target_modules=[embed_tokens]", "the embedding is not a linear layer. Train it whole with"),
        ("method.modules_to_save=[lm_heat]", "method.modules_to_save=lm_heat: matches no module"),
        ("lora_modules_to_save=[lm_head]", "unknown key. Did you mean method.modules_to_save?"),
    ],
)
def test_lora_options_that_fit_no_layer(refused, override, message):
    assert message in refused(override)


def test_fewer_rows_than_ranks(refused):
    assert "batch.global_rows=2 is less than the world size 3" in refused("batch.global_rows=2", nproc=3)


def test_output_folder_not_writable(cli, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    done = cli("train", "smoke", f"output_dir={blocked / 'run'}")
    assert done.returncode == 2
    assert f"{blocked} is a file, not a folder" in done.stderr


def test_output_folder_where_nothing_can_be_created(cli):
    # not even root can create folders there
    done = cli("train", "smoke", "output_dir=/proc/run")
    assert done.returncode == 2
    assert "output_dir=/proc/run: cannot write in /proc" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_no_such_recipe(cli):
    done = cli("train", "smoky")
    assert done.returncode == 2
    assert "smoke" in done.stderr


def test_rows_longer_than_the_model_supports(refused):
    assert "positions" in refused("data.max_length=1000000")
