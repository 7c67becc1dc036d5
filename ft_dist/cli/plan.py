"""`ft-dist plan`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ft_dist.cli.arguments import AsJson, Config, Overrides


def plan(
    config: Config,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None,
        typer.Option(help="h200, h100, a100-80, l40s, 4090, b200 or mi300x (default: this machine's, or h100)"),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Number of nodes")] = 1,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="GPUs per node (default: 8)")] = None,
    price: Annotated[float | None, typer.Option(min=0.0, metavar="$/H", help="Price of one GPU per hour")] = None,
    preemptions: Annotated[
        float | None,
        typer.Option(
            min=0.0, metavar="N", help="Expected preemptions of a spot node per day; suggests how often to commit"
        ),
    ] = None,
    network: Annotated[
        float | None,
        typer.Option(min=0.1, metavar="GBIT/S", help="Bandwidth between nodes, per GPU (default: typical for the GPU)"),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens per epoch (default: a quarter of the bytes of local files)")
    ] = None,
    fit: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write CONFIG to FILE, with the fastest settings that fit")
    ] = None,
    picture: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw memory and step time as HTML")] = None,
    as_json: AsJson = False,
) -> None:
    """Estimate memory, time and cost of CONFIG before a GPU is allocated. Reads only config.json, not the weights."""
    from ft_dist.config import load_config
    from ft_dist.plan.report import Cluster, fitted, gpu_here, plan_run, table

    cluster = Cluster(
        gpu=gpu or gpu_here() or "h100",
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        price=price,
        preemptions=preemptions or None,
        network=network * 1e9 / 8 if network else None,
        tokens=tokens,
    )
    settings = load_config(config, overrides or [])
    if fit:
        settings = fitted(settings, cluster, fit, recipe=config)
    tree = plan_run(settings, cluster)
    if picture:
        from ft_dist.plan.picture import write_picture

        write_picture(tree, picture)
    typer.echo(json.dumps(tree, indent=2) if as_json else table(tree))
