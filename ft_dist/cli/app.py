"""`ft-dist`: the verbs in the order of `ft-dist --help`, and the exit codes of errors.

A verb parses its arguments and calls one function. It imports what it needs inside its body, so that `ft-dist --help`
stays fast.
"""

import sys

import typer

from ft_dist.cli.bench import bench
from ft_dist.cli.checkpoint import checkpoint
from ft_dist.cli.launch import launch, logs, resume, status, stop
from ft_dist.cli.plan import plan
from ft_dist.cli.prepare import fetch, prepare, schema
from ft_dist.cli.result import chat, evaluate, export
from ft_dist.cli.train import check, train
from ft_dist.errors import EXIT_PREEMPTED, EXIT_USER, Preempted, UserError

app = typer.Typer(
    name="ft-dist",
    help="Fine-tune open language models, fully or with LoRA, without losing a step.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(train)
app.command()(check)
app.command()(plan)
app.command()(prepare)
app.command(name="eval")(evaluate)
app.command()(chat)
app.command()(export)
app.command()(schema)
app.command()(fetch)
app.command()(bench)
app.command()(launch)
app.command()(status)
app.command()(logs)
app.command()(stop)
app.command()(resume)
app.add_typer(checkpoint, name="checkpoint")


def main() -> None:
    """Entry point. Errors that the user can fix print one line and exit with 2, as typer's own usage errors do."""
    try:
        app()
    except UserError as error:
        typer.echo(f"ft-dist: error: {error}", err=True)
        sys.exit(EXIT_USER)
    except Preempted as preempted:
        typer.echo(f"ft-dist: {preempted}", err=True)
        sys.exit(EXIT_PREEMPTED)
