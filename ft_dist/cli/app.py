"""The verbs. Each parses its arguments, calls one function and turns errors into exit codes.

Imports of anything heavy stay inside the verbs: `ft-dist --help` answers at once.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from ft_dist.cli.bench import bench
from ft_dist.cli.plan import plan
from ft_dist.errors import EXIT_PREEMPTED, EXIT_USER, Preempted, UserError

app = typer.Typer(
    name="ft-dist",
    help="Fine-tune open language models, fully or with LoRA, without losing a step.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Config = Annotated[str, typer.Argument(help="YAML file, or the name of a shipped recipe such as smoke")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Override config keys")]
Force = Annotated[bool, typer.Option("--force", help="Start even what is planned not to fit in memory")]
Nproc = Annotated[int | None, typer.Option(min=1, help="Worker processes (default: one a GPU, or 1 on CPU)")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts")]


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    nproc: Nproc = None,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="Start failed workers again from the last commit, so often between two commits")
    ] = 3,
    force: Force = False,
) -> None:
    """Fine-tune as CONFIG says; run again to resume. Joins the world of torchrun or srun if started by them."""
    from ft_dist.check import check as check_config
    from ft_dist.config import load_config
    from ft_dist.launcher.agent import run_here
    from ft_dist.launcher.local import default_nproc, launched, leave_when_told

    arguments = [config, *(overrides or [])]
    if launched():
        from ft_dist.train import main as train_rank

        raise typer.Exit(train_rank(arguments))
    leave_when_told()
    workers = nproc or default_nproc()
    settings = load_config(config, overrides or [])
    check_config(settings, world_size=workers)
    if not force:
        from ft_dist.plan.guard import check_fits_here

        check_fits_here(settings, ranks=workers, ranks_per_node=workers)
    raise typer.Exit(run_here(arguments, settings, nproc=workers, max_restarts=max_restarts))


@app.command()
def check(
    config: Config,
    overrides: Overrides = None,
    nproc: Nproc = None,
    env: Annotated[
        bool, typer.Option("--env", help="Start the ranks: do they agree, see and reach each other?")
    ] = False,
    nnodes: Annotated[
        str, typer.Option(metavar="N|MIN:MAX", help="With --env: nodes, each running this command")
    ] = "1",
    rdzv: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="With --nnodes: where they meet")] = None,
    as_json: AsJson = False,
) -> None:
    """Tell everything that can be known before training; exit 2 if something must be mended."""
    from ft_dist.check import check as check_config
    from ft_dist.config import load_config
    from ft_dist.launcher.local import default_nproc

    if env and as_json:
        raise UserError("--env writes what the ranks find as lines; leave --json away.")
    facts = check_config(load_config(config, overrides or []), world_size=nproc or default_nproc())
    if env:
        from ft_dist.launcher.agent import main as run_agent

        place = ["--rdzv", rdzv] if rdzv else []
        workers = str(nproc or default_nproc())
        typer.echo("\n".join(facts))
        arguments = ["--check", "--nnodes", nnodes, "--nproc", workers, *place, config, *(overrides or [])]
        raise typer.Exit(run_agent(arguments))
    typer.echo(json.dumps({"ok": True, "facts": facts}, indent=2) if as_json else "\n".join([*facts, "ready to train"]))


app.command()(plan)


@app.command()
def prepare(
    config: Config,
    overrides: Overrides = None,
    to: Annotated[str | None, typer.Option(metavar="DIR_OR_URL", help="Where the sets go (default: the cache)")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Tokenising processes (default: one a core)")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 2 on warnings too")] = False,
    as_json: AsJson = False,
) -> None:
    """Tokenise CONFIG's data and tell what it is like; run again to go on where it stopped."""
    from ft_dist.config import load_config
    from ft_dist.prepare import prepare_config

    report = prepare_config(
        load_config(config, overrides or []),
        to=to,
        workers=workers,
        strict=strict,
        say=lambda line: typer.echo(line, err=as_json),
    )
    if as_json:
        typer.echo(json.dumps(report, indent=2, ensure_ascii=False))


@app.command(name="eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Run folder, model folder, built-in name or hub id")],
    data: Annotated[list[str] | None, typer.Option(help="Held-out files (default: the run's data.eval)")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 32,
    max_samples: Annotated[int | None, typer.Option(min=1)] = None,
    as_json: AsJson = False,
) -> None:
    """Held-out loss, perplexity and exact-match accuracy of a model on chat data."""
    from ft_dist.result.score import evaluate_path, table

    scores = evaluate_path(model, data or [], max_new_tokens=max_new_tokens, max_samples=max_samples)
    typer.echo(json.dumps(scores.to_dict(), indent=2, ensure_ascii=False) if as_json else table(scores))


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="Run folder, model folder, built-in name or hub id")],
    prompt: Annotated[str | None, typer.Option(help="Answer this once and leave")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt of the conversation")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token")] = 0.0,
) -> None:
    """Talk to a model in the terminal; answers stream as they are made."""
    from ft_dist.result.chat import chat as talk

    talk(model, prompt=prompt, system=system, max_new_tokens=max_new_tokens, temperature=temperature)


@app.command()
def export(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a finished run")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="New folder to write")],
    to: Annotated[
        Literal["merged", "adapter"], typer.Option(help="One plain model, or the LoRA weights alone")
    ] = "merged",
) -> None:
    """Write a run's result as a folder that plain transformers (and peft) load."""
    from ft_dist.result.export import export_run

    export_run(run_dir, kind=to, to=folder)
    typer.echo(f"{to} model written to {folder}")


@app.command()
def schema() -> None:
    """Print the JSON schema of the config."""
    from ft_dist.config import json_schema

    typer.echo(json_schema())


@app.command()
def fetch(
    name: Annotated[str | None, typer.Argument(help="Built-in name (smollm2-135m, tiny-llama, ...) or hub id")] = None,
    names: Annotated[bool, typer.Option("--list", help="List the built-in names")] = False,
) -> None:
    """Bring a model onto this machine, whole or not at all, and print its folder."""
    from ft_dist.model.builtin import builtin_names
    from ft_dist.model.builtin import fetch as fetch_model

    if names:
        typer.echo("\n".join(builtin_names()))
        return
    if name is None:
        raise UserError("no model named. Usage: ft-dist fetch NAME, or ft-dist fetch --list.")
    typer.echo(str(fetch_model(name, progress=lambda line: typer.echo(line, err=True))))


app.command()(bench)

RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="output_dir of a launched run")]


@app.command()
def launch(
    config: Config,
    overrides: Overrides = None,
    on: Annotated[
        Literal["local", "torchrun", "slurm", "sky", "k8s", "vm"], typer.Option(help="Where to run")
    ] = "local",
    nodes: Annotated[str, typer.Option(metavar="N|MIN:MAX", help="Machines")] = "1",
    gpus_per_node: Annotated[int | None, typer.Option(min=0, help="0 trains on CPU (default: the profile's)")] = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="Workers on each node (default: one a GPU, or 1)")] = None,
    profile: Annotated[str | None, typer.Option(help="What the cluster asks for: YAML file, or name of one")] = None,
    sweep: Annotated[list[str] | None, typer.Option(metavar="KEY=V1,V2", help="A run for each value")] = None,
    rdzv: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Where the nodes of torchrun meet")] = None,
    max_restarts: Annotated[int, typer.Option(min=0, help="Restarts of failed workers between two commits")] = 3,
    force: Force = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be submitted; write nothing")] = False,
    no_follow: Annotated[bool, typer.Option("--no-follow", help="Leave once it is submitted")] = False,
    as_json: AsJson = False,
) -> None:
    """Check CONFIG, submit it, show its log. It saves, requeues and resumes by itself; Ctrl-C leaves it running."""
    from ft_dist.launcher.launch import log_size, planned, submitted, watch
    from ft_dist.launcher.request import make_request

    request = make_request(
        config,
        overrides or [],
        target=on,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        nproc=nproc,
        profile=profile,
        sweep=sweep or [],
        rdzv=rdzv,
        max_restarts=max_restarts,
    )
    submission = planned(request, force=force)
    if dry_run:
        typer.echo(json.dumps(submission.as_dict(), indent=2) if as_json else submission.text(), nl=as_json)
        return
    start = log_size(submission.logs[0])
    records = submitted(submission)
    launched = list(zip(submission.runs, records, strict=True))
    if as_json:
        typer.echo(json.dumps([{"run": str(run.folder)} | vars(record) for run, record in launched], indent=2))
        return
    for run, record in launched:
        typer.echo(f"ft-dist: {run.folder}: job {record.job} of {record.target}")
    if submission.afterwards:
        typer.echo(submission.afterwards)
    if len(records) == 1 and records[0].log and not no_follow:
        raise typer.Exit(watch(submission.runs[0].folder, start=start, say=_say, show=_show))


@app.command()
def status(run_dir: RunDir, as_json: AsJson = False) -> None:
    """Whether a launched run waits, runs or has ended, its last step and newest commit."""
    from ft_dist.launcher.launch import status as status_of

    entry = status_of(run_dir.absolute())
    lines = [f"{key:8} {value}" for key, value in entry.items() if value not in (None, "")]
    typer.echo(json.dumps(entry, indent=2) if as_json else "\n".join(lines))


@app.command()
def logs(
    run_dir: RunDir,
    no_follow: Annotated[bool, typer.Option("--no-follow", help="Only what is there now")] = False,
) -> None:
    """Show the log of a launched run, until it ends."""
    from ft_dist.launcher.launch import show_log, watch

    if no_follow:
        show_log(run_dir.absolute(), _show)
        return
    raise typer.Exit(watch(run_dir.absolute(), say=_say, show=_show))


@app.command()
def stop(run_dir: RunDir) -> None:
    """Have a launched run commit and end; `ft-dist resume` goes on with it."""
    from ft_dist.launcher.launch import stop as stop_run

    _say(stop_run(run_dir.absolute()))


@app.command()
def resume(run_dir: RunDir) -> None:
    """Submit a launched run again, as it was; it goes on from its newest commit."""
    from ft_dist.launcher.launch import resume as resume_run

    record = resume_run(run_dir.absolute())
    _say(f"job {record.job} of {record.target}")


def _say(line: str) -> None:
    typer.echo(f"ft-dist: {line}", err=True)


def _show(text: str) -> None:
    typer.echo(text, nl=False)


checkpoints = typer.Typer(help="Look at, verify, compare and import checkpoints.", no_args_is_help=True)
app.add_typer(checkpoints, name="checkpoint")
Place = Annotated[Path, typer.Argument(metavar="DIR", help="Run folder, checkpoints/ folder, or one step-N folder")]


@checkpoints.command(name="ls")
def checkpoint_ls(place: Place, as_json: AsJson = False) -> None:
    """List the checkpoints in DIR."""
    from ft_dist.checkpoint.inspect import listing, table

    entries = listing(place)
    typer.echo(json.dumps(entries, indent=2) if as_json else table(entries))


@checkpoints.command(name="show")
def checkpoint_show(place: Place, as_json: AsJson = False) -> None:
    """Tell what the newest checkpoint in DIR holds."""
    from ft_dist.checkpoint.inspect import details, tell

    entry = details(place)
    typer.echo(json.dumps(entry, indent=2) if as_json else tell(entry))


@checkpoints.command(name="verify")
def checkpoint_verify(place: Place, as_json: AsJson = False) -> None:
    """Read every byte of the checkpoints in DIR; exit 2 if one is damaged."""
    from ft_dist.checkpoint.inspect import verified

    entries = verified(place)
    lines = [f"{entry['folder']}: {entry['problem'] or 'intact'}" for entry in entries]
    typer.echo(json.dumps(entries, indent=2) if as_json else "\n".join(lines))
    raise typer.Exit(EXIT_USER if any(entry["problem"] for entry in entries) else 0)


@checkpoints.command(name="diff")
def checkpoint_diff(first: Place, second: Place, as_json: AsJson = False) -> None:
    """Compare two checkpoints: config, position, and the largest difference in each kind of tensor."""
    from ft_dist.checkpoint.inspect import compared, tell

    entry = compared(first, second)
    typer.echo(json.dumps(entry, indent=2) if as_json else tell(entry))


@checkpoints.command(name="import")
def checkpoint_import(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="Checkpoint of DeepSpeed or Hugging Face's Trainer")],
    config: Config,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Make DIR the first checkpoint of CONFIG's run: weights, optimizer state and step. `ft-dist train` goes on."""
    from ft_dist.checkpoint.foreign.importing import import_checkpoint
    from ft_dist.config import load_config

    commit = import_checkpoint(load_config(config, overrides or []), source)
    folder, step = str(commit.folder), commit.step
    typer.echo(json.dumps({"folder": folder, "step": step}) if as_json else f"step {step} imported to {folder}")


def main() -> None:
    """Entry point: what the user can mend is told in one line, with exit code 2 as for typer's own usage errors."""
    try:
        app()
    except UserError as error:
        typer.echo(f"ft-dist: error: {error}", err=True)
        sys.exit(EXIT_USER)
    except Preempted as stopped:
        typer.echo(f"ft-dist: {stopped}", err=True)
        sys.exit(EXIT_PREEMPTED)
