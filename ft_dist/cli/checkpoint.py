"""`ft-dist checkpoint ls|show|verify|diff|import`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ft_dist.cli.arguments import AsJson, Config, Overrides
from ft_dist.errors import EXIT_USER

checkpoint = typer.Typer(help="Inspect, verify, compare and import checkpoints.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Run folder, checkpoints/ folder, or one step-N folder")]

Place = Annotated[
    str,
    typer.Argument(metavar="DIR|URL", help="Run folder, checkpoints/ folder, one step-N folder, or a checkpoint.path"),
]


@checkpoint.command()
def ls(place: Folder, as_json: AsJson = False) -> None:
    """List the checkpoints in DIR."""
    from ft_dist.checkpoint.inspect import listing, table

    entries = listing(place)
    typer.echo(json.dumps(entries, indent=2) if as_json else table(entries))


@checkpoint.command()
def show(place: Folder, as_json: AsJson = False) -> None:
    """Show the contents of the newest checkpoint in DIR."""
    from ft_dist.checkpoint.inspect import as_text, details

    entry = details(place)
    typer.echo(json.dumps(entry, indent=2) if as_json else as_text(entry))


@checkpoint.command()
def verify(place: Place, as_json: AsJson = False) -> None:
    """Read every byte of the checkpoints in DIR, or of their copies at a URL; exit 2 if one is damaged."""
    from ft_dist.checkpoint.inspect import verified

    entries = verified(place, log=lambda line: typer.echo(line, err=True))
    lines = [f"{entry['folder']}: {entry['problem'] or 'intact'}" for entry in entries]
    typer.echo(json.dumps(entries, indent=2) if as_json else "\n".join(lines))
    raise typer.Exit(EXIT_USER if any(entry["problem"] for entry in entries) else 0)


@checkpoint.command()
def diff(first: Folder, second: Folder, as_json: AsJson = False) -> None:
    """Compare two checkpoints: config, position, and the largest difference per kind of tensor."""
    from ft_dist.checkpoint.inspect import as_text, compared

    entry = compared(first, second)
    typer.echo(json.dumps(entry, indent=2) if as_json else as_text(entry))


@checkpoint.command(name="import")
def import_foreign(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="Checkpoint of DeepSpeed or Hugging Face's Trainer")],
    config: Config,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Import DIR as the first checkpoint of CONFIG's run: weights, optimizer state, step. `ft-dist train` resumes."""
    from ft_dist.checkpoint.foreign.importing import import_checkpoint
    from ft_dist.config import load_config

    commit = import_checkpoint(load_config(config, overrides or []), source)
    folder, step = str(commit.folder), commit.step
    typer.echo(json.dumps({"folder": folder, "step": step}) if as_json else f"step {step} imported to {folder}")
