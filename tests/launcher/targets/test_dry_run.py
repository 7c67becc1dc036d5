"""The platforms' own programs and schemas accept the output of `ft-dist launch --dry-run`."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from ft_dist.config import load_config
from ft_dist.config.load import validate
from ft_dist.errors import UserError
from ft_dist.launcher.launch import plan_submission
from ft_dist.launcher.options import make_request
from ft_dist.launcher.submission import Submission
from tests.launcher.slurm_cluster import SlurmCluster, slurm_cluster

SCHEMAS = Path(__file__).parent / "schemas"
KUBERNETES = "1.31"
SHELLCHECK = Path(sys.executable).parent / "shellcheck"
# every character that needs quoting in some kind of file
AWKWARD = 'it\'s "quoted" $HOME `date` {{ x }} é'


def plan(target: str, *overrides: str, recipe: str = "smoke", **options: Any) -> Submission:
    defaults: dict[str, Any] = {
        "nodes": "1",
        "gpus_per_node": 0,
        "nproc": 2,
        "profile": None,
        "sweep": [],
        "rdzv": None,
    }
    return plan_submission(make_request(recipe, overrides, target=target, **defaults | options, max_restarts=3))


def profile(folder: Path, **content: Any) -> str:
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def shellcheck(text: str) -> None:
    # 2329: a function called only by a trap; 2016: a literal `$` in single quotes
    command = [SHELLCHECK, "--shell=bash", "--exclude=SC2329,SC2016", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[SlurmCluster]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


EVERYTHING: dict[str, Any] = {
    "modules": ["cuda/12.8"],
    "interface": "lo",
    "environment": {"NOTE": AWKWARD},
    "slurm": {"partition": "low", "time": "10", "cpus_per_node": 2, "memory_per_node": "1G", "extra": ["--comment=x"]},
}


@pytest.mark.faults
@pytest.mark.parametrize("nodes", ["1", "2", "1:2"])
@pytest.mark.parametrize("content", [{}, EVERYTHING, {"venv": "/shared/my venv"}])
def test_sbatch_accepts_the_job_script(cluster, tmp_path, nodes, content):
    submission = plan("slurm", f"output_dir={tmp_path}/my run", nodes=nodes, profile=profile(tmp_path, **content))
    script = tmp_path / "job.sbatch"
    script.write_text(submission.text())
    shellcheck(submission.text())
    cluster.run("sbatch", "--test-only", str(script))


@pytest.mark.faults
def test_sbatch_accepts_the_job_array_of_a_sweep(cluster, tmp_path):
    sweep = ["optim.lr=1e-3,2e-3", "method.rank=4,8"]
    submission = plan("slurm", f"output_dir={tmp_path}/sweep", sweep=sweep)
    assert "#SBATCH --array=0-3" in submission.text()
    assert len({run.folder for run in submission.runs}) == 4
    configs = [yaml.safe_load(submission.files[run.pinned]) for run in submission.runs]
    assert [(config["optim"]["lr"], config["method"]["rank"]) for config in configs] == [
        (1e-3, 4),
        (1e-3, 8),
        (2e-3, 4),
        (2e-3, 8),
    ]
    assert [config["output_dir"] for config in configs] == [str(run.folder) for run in submission.runs]
    script = tmp_path / "job.sbatch"
    script.write_text(submission.text())
    shellcheck(submission.text())
    cluster.run("sbatch", "--test-only", str(script))


def test_the_pyxis_container_mounts_the_run_folder_and_the_volumes(tmp_path):
    content = {
        "container": "registry#team/image",
        "volumes": {"/data": "/shared/data"},
        "gpus_per_node": 8,
        "gpu": "h100",
    }
    submission = plan(
        "slurm", "batch.global_rows=8", gpus_per_node=None, nproc=None, profile=profile(tmp_path, **content)
    )
    text = submission.text()
    shellcheck(text)
    assert "--container-image='registry#team/image' --container-workdir=" in text
    assert '--container-mounts="$run:$run",' in text
    assert ",/shared/data:/data " in text
    assert "#SBATCH --gpus-per-node=h100:8" in text
    assert "python -m ft_dist.launcher.agent --nnodes 1 --nproc 8" in text


@pytest.mark.parametrize(
    "target, options",
    [
        ("local", {}),
        ("torchrun", {"nodes": "2", "rdzv": "10.0.0.1:29500"}),
        ("torchrun", {"nodes": "1:3", "rdzv": "[fd00::1]:29500"}),
        ("vm", {}),
    ],
)
def test_shell_scripts_pass_shellcheck(tmp_path, target, options):
    content = {"environment": {"NOTE": AWKWARD}, "interface": "eth0"}
    overrides = ["checkpoint.path=s3://bucket/run", f"observe.run_name={AWKWARD}"] if target == "vm" else []
    submission = plan(target, *overrides, **options, profile=profile(tmp_path, **content))
    shellcheck(submission.text())


def test_the_pinned_config_is_the_one_that_was_checked(tmp_path):
    submission = plan("slurm", f"output_dir={tmp_path}/run", "optim.lr=3e-3", "data.max_length=256")
    submission.write()
    pinned = load_config(str(submission.runs[0].pinned))
    assert pinned == submission.runs[0].config
    assert (pinned.optim.lr, pinned.data.max_length, pinned.output_dir) == (3e-3, 256, f"{tmp_path}/run")


@pytest.mark.parametrize("own_recipe", [False, True])
@pytest.mark.parametrize("gpus", [0, 8])
def test_skypilot_accepts_the_task(tmp_path, own_recipe, gpus):
    content = {
        "gpu": "H100",
        "environment": {"NOTE": AWKWARD},
        "sky": {"setup": "pip install x\npip install y", "infra": "aws"},
    }
    recipe = portable_recipe(tmp_path) if own_recipe else "smoke"
    submission = plan(
        "sky",
        "checkpoint.path=s3://bucket/run",
        recipe=recipe,
        gpus_per_node=gpus,
        profile=profile(tmp_path, **content),
    )
    task = yaml.safe_load(submission.text())
    schemas = json.loads((SCHEMAS / "skypilot.json").read_text())
    jsonschema.validate(task, schemas["task"])
    jsonschema.validate(task["resources"], schemas["resources"])
    assert task["envs"]["NOTE"] == AWKWARD
    assert task["resources"].get("accelerators") == ("H100:8" if gpus else None)
    shellcheck(task["run"])
    shellcheck(task["setup"])
    if own_recipe:
        assert_embedded(task["run"].split("'END_OF_CONFIG'\n")[1].split("END_OF_CONFIG")[0], submission)


@pytest.mark.parametrize("own_recipe", [False, True])
@pytest.mark.parametrize("kind", ["jobset", "pytorchjob"])
@pytest.mark.parametrize("nodes", ["1", "3"])
def test_kubernetes_accepts_the_manifest(tmp_path, kind, nodes, own_recipe):
    content = {
        "container": "registry/team/image",
        "volumes": {"/data": "claim"},
        "environment": {"NOTE": AWKWARD},
        "kubernetes": {"kind": kind, "namespace": "training", "secrets": ["credentials"]},
    }
    submission = plan(
        "k8s",
        "output_dir=/data/runs/one",
        recipe=portable_recipe(tmp_path) if own_recipe else "smoke",
        nodes=nodes,
        gpus_per_node=2,
        profile=profile(tmp_path, **content),
    )
    *config_maps, job = yaml.safe_load_all(submission.text())
    assert len(config_maps) == own_recipe
    for config_map in config_maps:
        kubernetes_validate.validate(config_map, KUBERNETES, strict=True)
        assert_embedded(config_map["data"]["config.yaml"], submission)
    jsonschema.validate(job, json.loads((SCHEMAS / "kubernetes.json").read_text())[kind])
    for template in pod_templates(job):
        kubernetes_validate.validate(
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": template["spec"]},
            KUBERNETES,
            strict=True,
        )
        container = template["spec"]["containers"][0]
        assert {"name": "NOTE", "value": AWKWARD} in container["env"]
        # JobSet and Kubeflow set these
        shellcheck(f"export POD_IP=x JOB_COMPLETION_INDEX=0\n{container['args'][0]}")


def pod_templates(job: dict[str, Any]) -> list[dict[str, Any]]:
    if job["kind"] == "PyTorchJob":
        return [replicas["template"] for replicas in job["spec"]["pytorchReplicaSpecs"].values()]
    (replicated,) = job["spec"]["replicatedJobs"]
    inner = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": replicated["template"]["spec"]}
    kubernetes_validate.validate(inner, KUBERNETES, strict=True)
    return [replicated["template"]["spec"]["template"]]


def portable_recipe(folder: Path) -> str:
    """A user's own recipe, whose data is a hub id."""
    path = folder / "mine.yaml"
    path.write_text(
        f"model: {{path: tiny-llama}}\ndata: {{train: [someone/some-data]}}\n"
        f"observe: {{run_name: {json.dumps(AWKWARD)}}}\nbatch: {{global_rows: 8}}\noutput_dir: runs/mine\n"
    )
    return str(path)


def assert_embedded(text: str, submission: Submission) -> None:
    """The embedded config is exactly the planned one, quotes included."""
    planned = submission.runs[0].config
    embedded = validate(yaml.safe_load(text))
    assert embedded.model_dump() == planned.model_dump()
    assert ("epochs" in embedded.optim.model_fields_set) == ("epochs" in planned.optim.model_fields_set)


@pytest.mark.parametrize(
    "target, overrides, content, message",
    [
        ("slurm", [], {"slurm": {"partitoin": "x"}}, "slurm.partitoin: Extra inputs"),
        ("slurm", [], {"venv": "/a", "container": "b"}, "venv and container are both set"),
        ("slurm", ["batch.global_rows=1"], {}, "batch.global_rows=1 is less than the world size 2"),
        ("sky", [], {"container": "x"}, "checkpoint.path=None: the machine's disk is lost"),
        ("sky", ["checkpoint.path=s3://b/r"], {}, "set container or sky.setup"),
        ("k8s", ["checkpoint.path=s3://b/r"], {}, "set container in the --profile"),
        ("vm", ["checkpoint.path=s3://b/r", "model.path=/home/me/model"], {}, "/home/me/model is on this machine"),
    ],
)
def test_errors_are_reported_before_submission(tmp_path, target, overrides, content, message):
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        plan(target, *overrides, profile=profile(tmp_path, **content))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"nodes": "2:1"}, "--nodes 2:1"),
        ({"nodes": "2"}, "--on local uses one machine"),
        ({"sweep": ["optim.lr"]}, "--sweep optim.lr: should be"),
        ({"sweep": ["optim.lr=1e-3,2e-3"]}, "--sweep gives 2 runs, but --on local takes one"),
        ({"profile": "nowhere"}, "--profile nowhere: no file and no profile has that name"),
    ],
)
def test_invalid_options_are_reported(options, message):
    with pytest.raises(UserError, match=message):
        plan("local", **options)


def test_every_shipped_profile_loads_and_plans(tmp_path):
    for name, target in (
        ("slurm-modules", "slurm"),
        ("slurm-container", "slurm"),
        ("sky-spot", "sky"),
        ("kubernetes", "k8s"),
    ):
        overrides = ["checkpoint.path=s3://bucket/run", "batch.global_rows=8"]
        assert plan(target, *overrides, gpus_per_node=None, nproc=None, profile=name).text()


def test_a_dry_run_writes_nothing_and_the_verb_prints_the_script(cli, tmp_path):
    options = ["--on", "slurm", "--gpus-per-node", "0", "--dry-run"]
    done = cli("launch", "smoke", f"output_dir={tmp_path}/run", *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("#!/bin/bash\n#SBATCH")
    assert not (tmp_path / "run").exists()
    whole = json.loads(cli("launch", "smoke", f"output_dir={tmp_path}/run", *options, "--json").stdout)
    assert whole["command"] == ["sbatch", "--parsable", whole["script"]]
    assert whole["files"][whole["script"]] == done.stdout
