"""`ft-dist launch`, `status`, `logs`, `stop` and `resume`."""

import json
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ft_dist.cli.arguments import AsJson, Config, Force, Overrides, RunDir
from ft_dist.launcher.targets.table import TARGETS

if TYPE_CHECKING:
    TargetName = str
else:
    # the table is the only list of targets, but type checkers need a literal one
    TargetName = Literal[tuple(TARGETS)]


def launch(
    config: Config,
    overrides: Overrides = None,
    on: Annotated[TargetName, typer.Option(help="Where to run")] = "local",
    nodes: Annotated[str, typer.Option(metavar="N|MIN:MAX", help="Number of machines")] = "1",
    gpus_per_node: Annotated[int | None, typer.Option(min=0, help="0 trains on CPU (default: the profile's)")] = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="Workers per node (default: one per GPU, or 1)")] = None,
    profile: Annotated[
        str | None, typer.Option(help="What the cluster requires: a YAML file, or the name of a profile")
    ] = None,
    sweep: Annotated[list[str] | None, typer.Option(metavar="KEY=V1,V2", help="Submit one run per value")] = None,
    rdzv: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="With --on torchrun: rendezvous of the nodes")
    ] = None,
    max_restarts: Annotated[int, typer.Option(min=0, help="Maximum worker restarts between two commits")] = 3,
    force: Force = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be submitted; write nothing")] = False,
    no_follow: Annotated[bool, typer.Option("--no-follow", help="Exit once the run is submitted")] = False,
    as_json: AsJson = False,
) -> None:
    """Check CONFIG, submit it and show its log. The run commits, requeues and resumes automatically; Ctrl-C leaves it
    running."""
    from ft_dist.launcher.launch import log_size, plan_submission, submit, watch
    from ft_dist.launcher.options import make_request

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
    submission = plan_submission(request, force=force)
    if dry_run:
        typer.echo(json.dumps(submission.as_dict(), indent=2) if as_json else submission.text(), nl=as_json)
        return
    start = log_size(submission.logs[0])
    records = submit(submission)
    launched = list(zip(submission.runs, records, strict=True))
    if as_json:
        typer.echo(json.dumps([{"run": str(run.folder)} | vars(record) for run, record in launched], indent=2))
        return
    for run, record in launched:
        typer.echo(f"ft-dist: {run.folder}: job {record.job} of {record.target}")
    if submission.next_steps:
        typer.echo(submission.next_steps)
    if len(records) == 1 and records[0].log and not no_follow:
        raise typer.Exit(watch(submission.runs[0].folder, start=start, say=_say, show=_show))


def status(run_dir: RunDir, as_json: AsJson = False) -> None:
    """Show whether a launched run is queued, running or over, with its last step and newest commit."""
    from ft_dist.launcher.launch import status as status_of

    entry = status_of(run_dir.absolute())
    lines = [f"{key:8} {value}" for key, value in entry.items() if value not in (None, "")]
    typer.echo(json.dumps(entry, indent=2) if as_json else "\n".join(lines))


def logs(
    run_dir: RunDir,
    no_follow: Annotated[bool, typer.Option("--no-follow", help="Show the log so far and exit")] = False,
) -> None:
    """Show the log of a launched run until the run ends."""
    from ft_dist.launcher.launch import show_log, watch

    if no_follow:
        show_log(run_dir.absolute(), _show)
        return
    raise typer.Exit(watch(run_dir.absolute(), say=_say, show=_show))


def stop(run_dir: RunDir) -> None:
    """Ask a launched run to commit and end; `ft-dist resume` resumes it."""
    from ft_dist.launcher.launch import stop as stop_run

    _say(stop_run(run_dir.absolute()))


def resume(run_dir: RunDir) -> None:
    """Submit a launched run again, unchanged; it resumes from its newest commit."""
    from ft_dist.launcher.launch import resume as resume_run

    record = resume_run(run_dir.absolute())
    _say(f"job {record.job} of {record.target}")


def _say(line: str) -> None:
    typer.echo(f"ft-dist: {line}", err=True)


def _show(text: str) -> None:
    typer.echo(text, nl=False)
