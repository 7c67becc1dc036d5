"""No value of a config or profile becomes code in what is submitted: bash runs the scripts, with stubs as programs."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from ft_dist.config import load_config
from ft_dist.errors import ConfigError, UserError
from ft_dist.launcher.launch import plan_submission
from ft_dist.launcher.options import make_request
from ft_dist.launcher.profiles import Profile, load_profile
from ft_dist.launcher.record import read_record
from ft_dist.launcher.submission import Submission
from tests.launcher.slurm_cluster import slurm_cluster
from tests.launcher.targets.test_dry_run import KUBERNETES, pod_templates, portable_recipe, shellcheck

PLANTED = "a'b\"c $(touch planted) `touch planted` ;touch planted; # %j {{ 7*7 }} é\U0001f600 $(POD_IP) $$ &x *y !z"
"""One line with whatever some kind of file gives a meaning to"""
STUBS = ("python", "python3", "srun", "scontrol", "scancel", "module")


def quoted(text: object) -> str:
    return json.dumps(str(text), ensure_ascii=False)


def submission(target: str, folder: Path, *overrides: str, recipe: str = "smoke", **content: Any) -> Submission:
    profile = folder / "profile.yaml"
    profile.write_text(yaml.safe_dump(content, allow_unicode=True))
    options: dict[str, Any] = {"nodes": "1", "gpus_per_node": 8, "nproc": 2, "sweep": [], "rdzv": None}
    request = make_request(recipe, overrides, target=target, profile=str(profile), max_restarts=3, **options)
    return plan_submission(request, force=True)


def executed(script: str, folder: Path, **environment: str) -> list[list[str]]:
    """Run `script`; returns the words of each call of a stub. Fails if the script made the file `planted`."""
    (folder / "bin").mkdir()
    calls = folder / "calls.jsonl"
    for name in STUBS:
        stub = folder / "bin" / name
        stub.write_text(
            f'#!/bin/bash\nprintf "%s\\0" {name} "$@" >>{calls}\nprintf "\\n\\0" >>{calls}\necho NodeAddr=10.0.0.1\n'
        )
        stub.chmod(0o755)
    work = folder / "work"
    work.mkdir()
    (folder / "script.sh").write_text(script)
    subprocess.run(
        ["bash", "script.sh"],
        cwd=folder,
        env={"PATH": f"{folder}/bin:{os.environ['PATH']}", "HOME": str(work), "FT_DIST_HOME": str(work), **environment},
        timeout=30,
        capture_output=True,
    )
    assert not list(folder.rglob("planted")), script
    words = calls.read_text().split("\0")
    found: list[list[str]] = [[]]
    for word in words[:-1]:
        if word == "\n":
            found.append([])
        else:
            found[-1].append(word)
    return found[:-1]


def agent_call(calls: list[list[str]]) -> list[str]:
    return next(call for call in calls if "ft_dist.launcher.agent" in call)


def test_a_shell_script_of_this_machine(tmp_path: Path) -> None:
    run = tmp_path / PLANTED.replace("/", "_") / "run"
    venv = tmp_path / "my 'venv'"
    venv.mkdir()
    (venv / "bin").symlink_to(tmp_path / "bin")
    content = {"environment": {"NOTE": PLANTED}, "modules": [PLANTED], "interface": PLANTED, "venv": str(venv)}
    found = submission("local", tmp_path, f"output_dir={quoted(str(run))}", "batch.global_rows=8", **content)
    shellcheck(found.text())
    script = found.text().replace(f"cd {os.getcwd()}", "cd work")
    assert agent_call(executed(script, tmp_path))[-1] == f"{run}/launch/config.yaml"


@pytest.mark.parametrize("field", ["partition", "account", "qos", "time", "memory_per_node"])
def test_a_job_script(tmp_path: Path, field: str) -> None:
    run = tmp_path / PLANTED / "run"
    found = submission(
        "slurm",
        tmp_path,
        f"output_dir={quoted(str(run))}",
        "batch.global_rows=8",
        environment={"NOTE": PLANTED},
        container=PLANTED,
        gpu=PLANTED,
        volumes={"/data": PLANTED},
        slurm={field: PLANTED, "extra": [f"--comment={PLANTED}"]},
    )
    shellcheck(found.text())
    (run / "launch").mkdir(parents=True)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n0", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_END_TIME": "9"}
    script = found.text().replace(f"cd {os.getcwd()}", "cd work")
    call = agent_call(executed(script, tmp_path, **job))
    assert f"--container-image={PLANTED}" in call
    assert call[-1] == f"{run}/launch/config.yaml"


@pytest.mark.faults
def test_sbatch_reads_the_values_as_they_are(tmp_path: Path) -> None:
    run = tmp_path / PLANTED / "run"
    with slurm_cluster(tmp_path / "slurm", nodes=1) as cluster:
        text = submission(
            "slurm",
            tmp_path,
            f"output_dir={quoted(str(run))}",
            "batch.global_rows=8",
            slurm={"account": PLANTED},
        ).text()
        # the cluster has no GPUs
        text = "".join(line for line in text.splitlines(keepends=True) if "--gpus" not in line)
        script = tmp_path / "job.sbatch"
        script.write_text(text.partition("set -uo pipefail")[0] + "echo the log\n")
        (run / "logs").mkdir(parents=True)
        job = cluster.run("sbatch", "--wait", "--parsable", str(script)).strip()
        shown = cluster.run("scontrol", "show", "job", job)
    assert f"account={PLANTED}".lower() in shown.lower()
    assert (run / "logs" / "slurm.log").read_text() == "the log\n"
    assert not list(tmp_path.rglob("planted"))


@pytest.mark.parametrize("own_recipe", [False, True])
def test_a_loop_for_a_plain_machine(tmp_path: Path, own_recipe: bool) -> None:
    overrides = ["checkpoint.path=s3://bucket/run", f"observe.run_name={quoted(PLANTED)}"]
    overrides += ['model.new_tokens=["a\\nEND_OF_CONFIG\\ntouch planted\\n"]', f"output_dir={quoted(PLANTED)}"]
    recipe = portable_recipe(tmp_path) if own_recipe else "smoke"
    content = {"environment": {"NOTE": PLANTED}, "interface": PLANTED}
    found = submission("vm", tmp_path, *overrides, "batch.global_rows=8", recipe=recipe, **content)
    shellcheck(found.text())
    calls = executed(found.text(), tmp_path)
    if own_recipe:
        (embedded,) = (tmp_path / "work").rglob("config.yaml")
        assert load_config(str(embedded)).model_dump() == found.runs[0].config.model_dump()
    else:
        assert agent_call(calls)[-len(overrides) - 1 :] == [*overrides, "batch.global_rows=8"]


@pytest.mark.parametrize("own_recipe", [False, True])
def test_a_task_of_skypilot(tmp_path: Path, own_recipe: bool) -> None:
    overrides = ["checkpoint.path=s3://bucket/run", f"observe.run_name={quoted(PLANTED)}", "batch.global_rows=8"]
    recipe = portable_recipe(tmp_path) if own_recipe else "smoke"
    setup = f"  {PLANTED}\n\n{PLANTED}\n"
    content = {"container": PLANTED, "gpu": PLANTED, "environment": {"NOTE": PLANTED}, "volumes": {"/data": PLANTED}}
    found = submission("sky", tmp_path, *overrides, recipe=recipe, sky={"setup": setup, "infra": PLANTED}, **content)
    task = yaml.safe_load(found.text())
    assert task["setup"] == setup
    assert task["envs"]["NOTE"] == task["resources"]["infra"] == task["volumes"]["/data"] == PLANTED
    assert task["resources"]["accelerators"] == f"{PLANTED}:8"
    calls = executed(task["run"], tmp_path, SKYPILOT_NODE_IPS="10.0.0.1", SKYPILOT_TASK_ID="x")
    if not own_recipe:
        assert agent_call(calls)[-len(overrides) :] == overrides


def as_kubernetes_expands(text: str, **variables: str) -> str:
    """https://github.com/kubernetes/kubernetes/blob/master/third_party/forked/golang/expansion/expand.go"""
    out, at = "", 0
    while at < len(text):
        if text[at] == "$" and text[at + 1 : at + 2] == "$":
            out, at = out + "$", at + 2
        elif text[at] == "$" and text[at + 1 : at + 2] == "(" and ")" in text[at:]:
            name = text[at + 2 : text.index(")", at)]
            out, at = out + variables.get(name, f"$({name})"), text.index(")", at) + 1
        else:
            out, at = out + text[at], at + 1
    return out


@pytest.mark.parametrize("own_recipe", [False, True])
@pytest.mark.parametrize("kind", ["jobset", "pytorchjob"])
def test_a_manifest(tmp_path: Path, kind: str, own_recipe: bool) -> None:
    overrides = ["output_dir=/data/x", f"observe.run_name={quoted(PLANTED)}", "batch.global_rows=8"]
    recipe = portable_recipe(tmp_path) if own_recipe else "smoke"
    content = {"container": PLANTED, "environment": {"NOTE": PLANTED}, "volumes": {"/data": PLANTED}}
    found = submission("k8s", tmp_path, *overrides, recipe=recipe, kubernetes={"kind": kind}, **content)
    *maps, job = yaml.safe_load_all(found.text())
    for config_map in maps:
        kubernetes_validate.validate(config_map, KUBERNETES, strict=True)
        (tmp_path / "embedded.yaml").write_text(config_map["data"]["config.yaml"])
        assert load_config(str(tmp_path / "embedded.yaml")).model_dump() == found.runs[0].config.model_dump()
    (template,) = pod_templates(job)
    container = template["spec"]["containers"][0]
    assert container["image"] == PLANTED
    note = next(each["value"] for each in container["env"] if each["name"] == "NOTE")
    assert as_kubernetes_expands(note, POD_IP="10.0.0.9") == PLANTED
    calls = executed(as_kubernetes_expands(container["args"][0], POD_IP="10.0.0.9"), tmp_path)
    if not own_recipe:
        assert agent_call(calls)[-len(overrides) :] == overrides


def texts(section: Any, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The keys of a profile whose value is text or a list or mapping of text."""
    found: list[tuple[str, ...]] = []
    for name, field in section.model_fields.items():
        if hasattr(field.annotation, "model_fields"):
            found += texts(field.annotation, (*prefix, name))
        elif "str" in str(field.annotation) and name != "setup":
            found.append((*prefix, name))
    return found


@pytest.mark.parametrize("key", texts(Profile), ids=".".join)
@pytest.mark.parametrize("text", ["a\ntouch planted", "a\x00", "a\x1b[2J", "a\u2028b"])
def test_no_field_of_a_profile_takes_control_characters(tmp_path: Path, key: tuple[str, ...], text: str) -> None:
    lists, mappings = ("modules", "extra", "secrets"), {"environment": "NOTE", "volumes": "/data"}
    value: Any = [f"--{text}"] if key[-1] in lists else {mappings[key[-1]]: text} if key[-1] in mappings else text
    for name in reversed(key):
        value = {name: value}
    path = tmp_path / "profile.yaml"
    path.write_text(yaml.safe_dump(value))
    with pytest.raises(ConfigError, match=key[-1]) as error:
        load_profile(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"{", "not readable as JSON"),
        (b"[]", "contains list, not a JSON object"),
        (b"[" * 100_000, "nested too deeply"),
        (b"{}", "target: Field required"),
        (b'{"target": "slurm", "job": "--all", "command": [], "log": null, "submitted_at": 1}', "job: String should"),
        (b'{"target": "slurm", "job": "7", "command": "rm", "log": null, "submitted_at": 1}', "command: Input should"),
    ],
)
def test_a_damaged_launch_record_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "launch.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"launch\.json: {message}") as error:
        read_record(tmp_path)
    assert "\n" not in str(error.value)


def test_each_run_of_a_sweep_has_its_own_mirror(tmp_path: Path) -> None:
    options: dict[str, Any] = {"nodes": "1", "gpus_per_node": 0, "nproc": 1, "profile": None, "rdzv": None}
    overrides = ["checkpoint.path=s3://bucket/run/", f"output_dir={tmp_path}/sweep"]
    request = make_request("smoke", overrides, target="slurm", sweep=["optim.lr=1e-3,2e-3"], max_restarts=3, **options)
    found = plan_submission(request)
    pinned = [yaml.safe_load(found.files[run.pinned]) for run in found.runs]
    assert [config["checkpoint"]["path"] for config in pinned] == [
        "s3://bucket/run/000-optim.lr=1e-3",
        "s3://bucket/run/001-optim.lr=2e-3",
    ]
    request = make_request(
        "smoke", overrides, target="slurm", sweep=["checkpoint.path=s3://a/b,s3://a/c"], max_restarts=3, **options
    )
    with pytest.raises(UserError, match=r"already gets its own folder below checkpoint\.path"):
        plan_submission(request)
