"""`ft-dist bench`."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from ft_dist.cli.arguments import AsJson, Force, Nproc, Overrides


def bench(
    model: Annotated[
        str, typer.Argument(help="Model folder, or a shape with random weights: llama3-8b, qwen3-8b, tiny, ...")
    ] = "smollm2-135m",
    overrides: Overrides = None,
    data: Annotated[str, typer.Option(help="synthetic, or the path of a data file")] = "synthetic",
    method: Annotated[str, typer.Option(metavar="KIND", help="method.kind: lora or full")] = "lora",
    length: Annotated[int, typer.Option(min=16, help="Tokens per packed row")] = 1024,
    rows: Annotated[int, typer.Option(min=1, help="Rows per step")] = 2,
    lengths: Annotated[
        str,
        typer.Option(
            metavar="full|MEDIAN", help="Lengths of synthetic samples: full rows, or log-normal with this median"
        ),
    ] = "full",
    labelled: Annotated[float, typer.Option(help="Share of synthetic tokens that are labelled")] = 1.0,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps, after two warm-up steps")] = 5,
    nproc: Nproc = None,
    checkpoint: Annotated[bool, typer.Option(help="Also time one save of the training state")] = True,
    force: Force = False,
    sweep: Annotated[
        bool,
        typer.Option("--sweep", help="Try micro-batches, checkpointing, ZeRO stages and kernels; name the fastest"),
    ] = False,
    scaling: Annotated[
        Literal["weak", "strong"] | None, typer.Option(help="Repeat on 1, 2, 4 ... ranks, up to --nproc")
    ] = None,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="DIR", help="Also write bench.json, bench.html and, in work/, logs")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure training on this machine: tokens/s, FLOP utilisation, memory, and where a step's time goes."""
    from ft_dist.bench.report import bench as run_bench
    from ft_dist.bench.show import text, write

    report = run_bench(
        model,
        overrides or [],
        data=data,
        method=method,
        length=length,
        rows=rows,
        lengths=lengths,
        labelled=labelled,
        steps=steps,
        checkpoint=checkpoint,
        force=force,
        nproc=nproc,
        sweep=sweep,
        scaling=scaling,
        work=to / "work" if to else None,
        say=lambda line: typer.echo(line, err=True),
    )
    if not report["measurements"]:
        return
    if to:
        write(report, to)
    typer.echo(json.dumps(report, indent=2) if as_json else text(report))
