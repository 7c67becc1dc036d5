"""`ft-dist eval`, `chat` and `export`: what a run has produced."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from ft_dist.cli.arguments import AsJson, AtStep, Model, Trust, step_of


def evaluate(
    model: Model,
    data: Annotated[list[str] | None, typer.Option(help="Held-out files (default: the run's data.eval)")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens per answer")] = 32,
    max_samples: Annotated[int | None, typer.Option(min=1, help="Use only the first samples (default: all)")] = None,
    step: AtStep = None,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Compute the held-out loss, perplexity and exact-match accuracy of a model on chat data."""
    from ft_dist.result.score import evaluate_path, table

    scores = evaluate_path(
        model,
        data or [],
        step=step_of(step),
        max_new_tokens=max_new_tokens,
        max_samples=max_samples,
        trust_remote_code=trust,
    )
    typer.echo(json.dumps(scores.to_dict(), indent=2, ensure_ascii=False) if as_json else table(scores))


def chat(
    model: Model,
    prompt: Annotated[str | None, typer.Option(help="Answer this prompt and exit")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt of the conversation")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens per answer")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the most likely token")] = 0.0,
    step: AtStep = None,
    trust: Trust = False,
) -> None:
    """Chat with a model in the terminal; answers are streamed."""
    from ft_dist.result.chat import chat as talk

    talk(
        model,
        step=step_of(step),
        prompt=prompt,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        trust_remote_code=trust,
    )


def export(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a run, finished or, with --step, still training")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="New folder to write")],
    to: Annotated[
        Literal["merged", "adapter"], typer.Option(help="A single merged model, or the LoRA adapter alone")
    ] = "merged",
    step: AtStep = None,
    dtype: Annotated[
        Literal["bf16", "fp32"] | None, typer.Option(help="Of a merged model (default: the run's, model.dtype)")
    ] = None,
    trust: Trust = False,
) -> None:
    """Write a run's result as a folder that plain transformers (and peft) can load."""
    from ft_dist.result.export import export_run

    export_run(run_dir, kind=to, to=folder, step=step_of(step), dtype=dtype, trust_remote_code=trust)
    typer.echo(f"{to} model written to {folder}")
