"""`ft-dist train` and `ft-dist check`."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from ft_dist.cli.arguments import AsJson, Config, Force, Nproc, Overrides
from ft_dist.errors import UserError

if TYPE_CHECKING:
    from ft_dist.data.prepare.preview import Preview


def train(
    config: Config,
    overrides: Overrides = None,
    nproc: Nproc = None,
    max_restarts: Annotated[int, typer.Option(min=0, help="Maximum worker restarts between two commits")] = 3,
    force: Force = False,
) -> None:
    """Fine-tune the model in CONFIG; run it again to resume. Under torchrun or srun, it joins their world."""
    from ft_dist.check import check as check_config
    from ft_dist.config import PINNED, load_config
    from ft_dist.launcher.agent import run_here
    from ft_dist.launcher.machine import default_nproc, exit_on_signal, launched
    from ft_dist.observe.streams import secure_streams
    from ft_dist.run.lock import refuse_if_locked

    arguments = [config, *(overrides or [])]
    if launched():
        from ft_dist.train import main as train_rank

        raise typer.Exit(train_rank(arguments))
    secure_streams()
    exit_on_signal()
    workers = nproc or default_nproc()
    settings = load_config(config, overrides or [])
    check_config(settings, world_size=workers)
    refuse_if_locked(settings.run_dir, say=_say)
    if not force:
        from ft_dist.plan.guard import check_fits_here

        check_fits_here(settings, ranks=workers, ranks_per_node=workers)
    raise typer.Exit(run_here([PINNED, *arguments], settings, nproc=workers, max_restarts=max_restarts))


def check(
    config: Config,
    overrides: Overrides = None,
    nproc: Nproc = None,
    model: Annotated[
        bool, typer.Option("--model", help="Also load the weights and check the model's loss, isolation and gradients")
    ] = False,
    env: Annotated[
        bool, typer.Option("--env", help="Also start the ranks and check that they agree and can reach each other")
    ] = False,
    nnodes: Annotated[
        str, typer.Option(metavar="N|MIN:MAX", help="With --env: number of nodes, each of which runs this command")
    ] = "1",
    rdzv: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="With --nnodes: rendezvous of the nodes")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run every check that is possible before training; exit 2 if something must be fixed."""
    from ft_dist.check import check as check_config
    from ft_dist.check import check_data, check_method, check_mirror
    from ft_dist.config import load_config
    from ft_dist.launcher.machine import default_nproc
    from ft_dist.run.lock import refuse_if_locked
    from ft_dist.run.proof.check_model import check_model

    if env and as_json:
        raise UserError("--env cannot be combined with --json, because the ranks print their results as lines.")
    settings = load_config(config, overrides or [])
    facts = check_config(settings, world_size=nproc or default_nproc())
    refuse_if_locked(settings.run_dir, say=_say)
    facts += [*check_method(settings), *check_mirror(settings)]
    more, previews = check_data(settings)
    facts += more
    facts = list(dict.fromkeys([*facts, *check_model(settings, weights=model, say=_say)]))
    if env:
        from ft_dist.launcher.agent import main as run_agent

        rendezvous = ["--rdzv", rdzv] if rdzv else []
        workers = str(nproc or default_nproc())
        typer.echo("\n".join(facts))
        arguments = ["--check", "--nnodes", nnodes, "--nproc", workers, *rendezvous, config, *(overrides or [])]
        raise typer.Exit(run_agent(arguments))
    if as_json:
        report = {"ok": True, "facts": facts, "data": [one.as_dict() for one in previews]}
        typer.echo(json.dumps(report, indent=2, ensure_ascii=False))
        return
    typer.echo("\n".join(facts))
    _show_sample(previews[0])
    typer.echo("ready to train")


def _show_sample(preview: "Preview") -> None:
    """The first sample; what is learnt is coloured in a terminal, and in brackets elsewhere."""
    from rich.console import Console
    from rich.text import Text

    from ft_dist.data.prepare.report import in_brackets

    if not preview.sample:
        return
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    coloured = console.color_system is not None
    typer.echo(f"a sample as the model sees it, {'coloured' if coloured else '[[in brackets]]'} where it learns:")
    text = Text() if coloured else Text(in_brackets(preview.sample))
    for run in preview.sample if coloured else []:
        text.append(run["text"], style="bold green" if run["learnt"] else "dim")
    text.rstrip()
    for line in text.split("\n", allow_blank=True):
        console.print(Text("  | ").append_text(line))


def _say(line: str) -> None:
    typer.echo(line, err=True)
