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
    """Check and train with these overrides. Both must refuse the run in the same words; returns the error line."""

    def run(*overrides: str, nproc: int = 1) -> str:
        output = tmp_path / "run"
        said = []
        for verb in ("check", "train"):
            done = cli(verb, "smoke", f"output_dir={output}", *overrides, "--nproc", str(nproc))
            assert done.returncode == 2, done.stdout + done.stderr
            assert "Traceback" not in done.stderr + done.stdout
            assert not output.exists()
            said.append(done.stderr.strip().splitlines())
        assert said[0] == said[1]
        assert len(said[0]) == 1, said
        return said[0][0]

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


def test_a_cache_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "file").touch()
    message = refused(f"data.cache_dir={tmp_path}/file/cache")
    assert message.endswith(f"cache/data: {tmp_path}/file is not a folder. Set data.cache_dir to a writable folder.")


def test_a_mirror_in_an_unknown_kind_of_store(refused):
    assert "unknown storage protocol foo://" in refused("checkpoint.path=foo://bucket/run")


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


def test_a_chat_template_that_is_not_there(refused):
    assert "model.chat_template=nowhere.jinja: no such file." in refused("model.chat_template=nowhere.jinja")


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


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["export", "a", "b", "--to", "mergd"],
            "Invalid value for '--to': 'mergd' is not one of 'merged', 'adapter'. ",
        ),
        (["train"], "Missing argument 'config'. `ft-dist train --help`"),
        (["train", "smoke", "--bogus"], "No such option: --bogus. "),
        (["train", "smoke", "--nproc"], "Option '--nproc' requires an argument. "),
        (["bench", "--rows", "0"], "Invalid value for '--rows': Input should be greater than or equal to 1. "),
        (["checkpoint", "sho"], "No such command 'sho'. Did you mean 'show'? `ft-dist checkpoint --help`"),
        (["trian"], "No such command 'trian'. Did you mean 'train'? `ft-dist --help`"),
    ],
)
def test_mistakes_in_the_command_line(cli, arguments, message):
    done = cli(*arguments)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"ft-dist: error: {message}")


@pytest.mark.parametrize("verb", [["eval"], ["chat", "--prompt", "Hi"], ["eval", "--data", "emails/test.jsonl"]])
def test_a_run_folder_that_does_not_exist(cli, tmp_path, verb):
    (tmp_path / "smoke").mkdir()
    done = cli(*verb, str(tmp_path / "smokee"))
    assert done.returncode == 2
    assert f"{tmp_path / 'smokee'}: no such folder. Did you mean {tmp_path / 'smoke'}?" in done.stderr
    assert "no such folder" in cli(*verb, "docs/smokee").stderr  # docs is a folder, not an owner on the hub
    unknown = cli("eval", "nobody/nothing").stderr
    assert "nobody/nothing: no such run folder, so there is no data.eval to score on." in unknown


def test_a_checkpoint_to_resume_from_is_named_by_its_folder(refused, tmp_path):
    commit = tmp_path / "other" / "checkpoints" / "step-00000005"
    commit.mkdir(parents=True)
    (commit / "manifest.json").write_text("{}")
    assert f"Name {commit}, or set checkpoint.resume=auto." in refused(f"checkpoint.resume={tmp_path / 'other'}")
    assert "Name the folder of one" in refused(f"checkpoint.resume={tmp_path}")
    commit.rename(commit.with_name("mine"))
    assert "a checkpoint folder is named step-N" in refused(f"checkpoint.resume={commit.with_name('mine')}")


def test_advice_is_never_what_the_config_already_does(refused, tmp_path):
    long = {"messages": [{"role": "user", "content": "word " * 100}, {"role": "assistant", "content": "Yes."}]}
    path = write(tmp_path, json.dumps(long))
    message = refused(f"data.train=[{path}]", "data.max_length=64", "data.too_long=truncate")
    assert "its only record cannot be used: 1 without a labelled token." in message
    assert "Raise data.max_length, or set model.chat_template." in message


def test_rows_longer_than_the_model_supports(refused):
    assert "positions" in refused("data.max_length=1000000")


@pytest.mark.parametrize(
    "command",
    [
        "eval ~nobody7/run",
        "eval smollm2-135m --data ~nobody7/x.jsonl",
        "chat ~nobody7/run",
        "export ~nobody7/run merged",
        "checkpoint verify file://~nobody7/run",
        "check smoke checkpoint.path=file://~nobody7/copies",
        "launch smoke --on slurm --profile ~nobody7/cluster.yaml",
        "plan smoke data.train=~nobody7/x.jsonl",
    ],
)
def test_the_home_of_an_unknown_user(cli, command):
    done = cli(*command.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "names the home folder of a user whom this machine does not have" in done.stderr


def test_a_cache_in_the_home_of_an_unknown_user(cli, tmp_path):
    done = cli("train", "smoke", f"output_dir={tmp_path / 'run'}", FT_DIST_CACHE="~nobody7/cache")
    assert (done.returncode, list(tmp_path.iterdir())) == (2, [])
    assert "'~nobody7/cache': names the home folder of a user whom" in done.stderr
