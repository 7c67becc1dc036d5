"""`ft-dist`: the verbs in the order of `ft-dist --help`, and the exit codes of errors.

A verb parses its arguments and calls one function. It imports what it needs inside its body, so that `ft-dist --help`
stays fast.
"""

import sys
from typing import NoReturn

import typer

from ft_dist.cli.bench import bench
from ft_dist.cli.checkpoint import checkpoint
from ft_dist.cli.launch import launch, logs, resume, status, stop
from ft_dist.cli.plan import plan
from ft_dist.cli.prepare import fetch, prepare, schema
from ft_dist.cli.result import chat, evaluate, export
from ft_dist.cli.train import check, train
from ft_dist.errors import EXIT_FAILED, EXIT_PREEMPTED, EXIT_USER, Preempted, UserError

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
    """Entry point. Errors that the user can fix, in the command line too, print one line and exit with 2."""
    try:
        # the code of typer.Exit; otherwise the result of the verb, which is None
        sys.exit(app(prog_name="ft-dist", standalone_mode=False))
    except UserError as error:
        _refuse(str(error))
    except typer.TyperException as error:
        message = " ".join(error.format_message().replace("Value error, ", "").split())
        if not message:  # no verb was given, and typer has printed the help
            sys.exit(EXIT_USER)
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "ft-dist"
        _refuse(f"{message}{'' if message.endswith(('.', '?')) else '.'} `{command} --help` shows how to use it.")
    except typer.Abort:
        sys.exit(EXIT_FAILED)
    except Preempted as preempted:
        typer.echo(f"ft-dist: {preempted}", err=True)
        sys.exit(EXIT_PREEMPTED)


def _refuse(message: str) -> NoReturn:
    typer.echo(f"ft-dist: error: {message}", err=True)
    sys.exit(EXIT_USER)
