"""The verb `ft-dist bench`. Imports of anything heavy stay inside it."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer


def bench(
    model: Annotated[
        str, typer.Argument(help="Model folder, or a shape with random weights: llama3-8b, qwen3-8b, tiny, ...")
    ] = "smollm2-135m",
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Override config keys")
    ] = None,
    data: Annotated[str, typer.Option(help="synthetic, or a data file")] = "synthetic",
    method: Annotated[Literal["lora", "full"], typer.Option(help="What is trained")] = "lora",
    length: Annotated[int, typer.Option(min=16, help="Tokens in a packed row")] = 1024,
    rows: Annotated[int, typer.Option(min=1, help="Rows in a step")] = 2,
    lengths: Annotated[
        str, typer.Option(metavar="full|MEDIAN", help="Synthetic samples: a whole row each, or log-normal")
    ] = "full",
    labelled: Annotated[float, typer.Option(help="Share of synthetic tokens that is learnt")] = 1.0,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps, after two to warm up")] = 5,
    nproc: Annotated[int | None, typer.Option(min=1, help="Worker processes (default: one a GPU, or 1 on CPU)")] = None,
    checkpoint: Annotated[bool, typer.Option(help="Also time one save of the training state")] = True,
    force: Annotated[bool, typer.Option("--force", help="Start even what is planned not to fit in memory")] = False,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Try micro-batches, checkpointing, ZeRO stages, kernels; name the fastest")
    ] = False,
    scaling: Annotated[
        Literal["weak", "strong"] | None, typer.Option(help="The same on 1, 2, 4 ... ranks, up to --nproc")
    ] = None,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="DIR", help="Also write bench.json, bench.html and, below work, logs")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts")] = False,
) -> None:
    """Measure training here: tokens/s, FLOP utilisation, memory, and where a step's time goes."""
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
