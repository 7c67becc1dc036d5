"""The verb `ft-dist plan`. Imports of anything heavy stay inside it."""

import json
from pathlib import Path
from typing import Annotated

import typer


def plan(
    config: Annotated[str, typer.Argument(help="YAML file, or the name of a shipped recipe such as smoke")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Override config keys")
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(help="h200, h100, a100-80, l40s, 4090, b200 or mi300x (default: this machine's, or h100)"),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1)] = 1,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="GPUs of a node (default: 8)")] = None,
    price: Annotated[float | None, typer.Option(min=0.0, metavar="$/H", help="Of a GPU for an hour")] = None,
    preemptions: Annotated[
        float | None, typer.Option(min=0.0, metavar="N", help="Of a spot node in a day; suggests how often to commit")
    ] = None,
    network: Annotated[
        float | None, typer.Option(min=0.1, metavar="GBIT/S", help="Between nodes, for each GPU (default: the GPU's)")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Of an epoch (default: a quarter of the bytes of local files)")
    ] = None,
    fit: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write CONFIG with the fastest setting that fits to FILE")
    ] = None,
    picture: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw memory and step as HTML")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts")] = False,
) -> None:
    """Tell memory, time and cost of CONFIG before a GPU is held. Reads the model's config.json, never its weights."""
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
