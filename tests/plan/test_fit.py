"""The fastest setting that fits, and the messages about those that do not."""

import pytest
import yaml

from ft_dist.config import load_config
from ft_dist.errors import ConfigError, ModelError
from ft_dist.plan.fit import KEYS, Place, fit, settings_of, with_settings
from ft_dist.plan.gpu import Device, gpu_named
from ft_dist.plan.guard import check_fits
from ft_dist.plan.memory.total import memory_plan
from ft_dist.plan.report import Cluster
from ft_dist.plan.speed import step_plan
from tests.conftest import SMALL_RUN
from tests.plan.shapes import LLAMA_8B, LLAMA_70B, folder

SMALL_8B = LLAMA_8B | {"num_hidden_layers": 4}  # a tenth of the work, the same widths


@pytest.fixture
def model(tmp_path):
    return folder(SMALL_8B, tmp_path / "model")


def test_the_written_recipe_is_the_fastest_that_fits(cli, tmp_path, model):
    path = tmp_path / "fitted.yaml"
    recipe = ["llama3_8b_full_zero3", f"model.path={model}", "batch.global_rows=64"]
    where = ["--gpu", "4090", "--gpus-per-node", "2"]
    done = cli("plan", *recipe, *where, "--fit", str(path))
    assert done.returncode == 0, done.stderr
    assert ": fits" in done.stdout
    config, before = load_config(str(path)), load_config(recipe[0], recipe[1:])
    assert config.model_dump(exclude={"engine", "batch", "data"}) == before.model_dump(
        exclude={"engine", "batch", "data"}
    )
    text = path.read_text()
    for key in KEYS:
        line = next(line for line in text.splitlines() if line.strip().startswith(key.split(".")[1] + ":"))
        assert "GiB" in line.split("#")[1], line
    chip, job = gpu_named("4090"), Cluster(gpu="4090", gpus_per_node=2).job(config)
    speed = step_plan(job, chip).tokens_per_s
    for stage in (1, 2, 3):
        for checkpointing in (False, True):
            for micro_rows in (1, 2, 4):
                values = (stage, "none", checkpointing, micro_rows)
                other = with_settings(config, dict(zip(KEYS, values, strict=True)))
                rival = Cluster(gpu="4090", gpus_per_node=2).job(other)
                if memory_plan(rival).peak <= chip.memory:
                    assert step_plan(rival, chip).tokens_per_s <= speed * 1.011, values


def test_a_setting_that_cannot_fit_is_refused_with_the_nearest_that_does(model):
    wide = ["engine.zero_stage=1", "batch.global_rows=512", "batch.micro_rows=64"]
    config = load_config("llama3_8b_full_zero3", [f"model.path={model}", *wide])
    device = Device("NVIDIA GeForce RTX 4090", gpu_named("4090").memory, gpu=True)
    with pytest.raises(ConfigError, match="This fits: ") as raised:
        check_fits(config, ranks=8, ranks_per_node=8, device=device)
    fix = str(raised.value).split("This fits: ")[1].split(" (")[0]
    mended = load_config("llama3_8b_full_zero3", [f"model.path={model}", *fix.split()])
    message = check_fits(mended, ranks=8, ranks_per_node=8, device=device)
    assert message is not None
    assert message.startswith("memory: ")


def test_more_gpus_are_proposed_if_nothing_else_helps(tmp_path):
    config = load_config(
        "llama3_8b_full_zero3", [f"model.path={folder(LLAMA_70B | {'num_hidden_layers': 20}, tmp_path / 'm')}"]
    )
    device = Device("NVIDIA L40S", int(20e9), gpu=True)
    with pytest.raises(ConfigError, match=r"It needs \d+ such devices"):
        check_fits(config, ranks=1, ranks_per_node=8, device=device)


def test_unknown_devices_and_models_are_not_judged(model, tmp_path):
    config = load_config("llama3_8b_lora", [f"model.path={model}"])
    assert check_fits(config, ranks=1, ranks_per_node=1, device=None) is None
    strange = folder({"model_type": "mamba"}, tmp_path / "mamba")
    config = load_config("llama3_8b_lora", [f"model.path={strange}"])
    assert check_fits(config, ranks=1, ranks_per_node=1, device=Device("GPU", 1, gpu=True)) is None


def test_names_of_layers_are_left_to_the_checks_of_the_model(tmp_path):
    """The plan assumes Llama's names for a family that it does not know."""
    device = Device("NVIDIA H100", int(80e9), gpu=True)
    for family, target in (("cohere", "qkv"), ("llama", "q_prok")):
        place = folder(LLAMA_8B | {"model_type": family}, tmp_path / family)
        config = load_config("llama3_8b_lora", [f"model.path={place}", f"method.target_modules=[{target},o_proj]"])
        line = check_fits(config, ranks=8, ranks_per_node=8, device=device)
        assert (line is None) == (family == "llama")
    with pytest.raises(ModelError, match="Did you mean q_proj"):
        Cluster(gpu="h100").job(config)


def test_ties_go_to_the_simplest_setting(model):
    config = load_config("llama3_8b_lora", [f"model.path={model}", "batch.global_rows=8"])
    chip = gpu_named("h200")
    found = fit(Cluster(gpu="h200").job(config), Place(chip.memory, chip))
    assert found is not None
    assert found.settings["engine.offload"] == "none"
    assert found.settings["engine.activation_checkpointing"] is False
    assert set(found.settings) == set(settings_of(config))


def test_train_refuses_on_this_machine_unless_forced(cli, tmp_path):
    """No machine's memory holds rows of 2 ** 20 tokens. The tiny model does not have that many positions either, which
    only training itself finds; --force gets that far."""
    huge = [*SMALL_RUN, "method.kind=full", "data.max_length=4096", "batch.global_rows=4000000"]
    huge += ["batch.micro_rows=4000000", f"output_dir={tmp_path / 'run'}", "optim.max_steps=1"]
    done = cli("train", *huge, "--nproc", "1")
    assert done.returncode == 2
    assert "this machine's memory has" in done.stderr
    assert "This fits: " in done.stderr
    assert "--force" in done.stderr
    assert not (tmp_path / "run").exists()


def test_launch_plans_for_the_gpu_of_the_profile(cli, tmp_path):
    profile = tmp_path / "cluster.yaml"
    profile.write_text(
        yaml.safe_dump({"gpus_per_node": 1, "gpu": "L40S", "volumes": {"/data": "claim"}, "container": "image"})
    )
    run = ["launch", "quickstart", "method.kind=full", "data.train=/data/emails.jsonl", "data.eval=[]"]
    run += ["evaluate.generate=false", "data.max_length=8192", "batch.micro_rows=64", "batch.global_rows=64"]
    run += ["output_dir=/data/run", "--on", "sky", "--profile", str(profile), "--dry-run"]
    done = cli(*run)
    assert done.returncode == 2, done.stdout
    assert "NVIDIA L40S has 44.5 GiB" in done.stderr
    assert "This fits: " in done.stderr
    forced = cli(*run, "--force")
    assert forced.returncode == 0, forced.stderr
