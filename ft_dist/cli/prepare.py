"""`ft-dist prepare`, `fetch` and `schema`: data, model and config, before a run."""

import json
from typing import Annotated

import typer

from ft_dist.cli.arguments import AsJson, Config, Overrides
from ft_dist.errors import UserError


def prepare(
    config: Config,
    overrides: Overrides = None,
    to: Annotated[
        str | None, typer.Option(metavar="DIR_OR_URL", help="Where to write the token sets (default: the cache)")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Tokenising processes (default: one per core)")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 2 on warnings too")] = False,
    as_json: AsJson = False,
) -> None:
    """Tokenise CONFIG's data and report on its quality; run it again to resume an interrupted preparation."""
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


def fetch(
    name: Annotated[str | None, typer.Argument(help="Built-in name (smollm2-135m, tiny-llama, ...) or hub id")] = None,
    names: Annotated[bool, typer.Option("--list", help="List the built-in names")] = False,
) -> None:
    """Download a model, completely or not at all, and print its folder."""
    from ft_dist.model.builtin import builtin_names
    from ft_dist.model.builtin import fetch as fetch_model

    if names:
        typer.echo("\n".join(builtin_names()))
        return
    if name is None:
        raise UserError("no model named. Usage: ft-dist fetch NAME, or ft-dist fetch --list.")
    typer.echo(str(fetch_model(name, progress=lambda line: typer.echo(line, err=True))))


def schema() -> None:
    """Print the JSON schema of the config."""
    from ft_dist.config import json_schema

    typer.echo(json_schema())
