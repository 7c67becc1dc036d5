"""Arguments and options that several verbs share."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ft_dist.errors import UserError

Config = Annotated[str, typer.Argument(help="YAML file, or the name of a shipped recipe such as smoke")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Override config keys")]
Force = Annotated[bool, typer.Option("--force", help="Start even if the memory plan says that the run does not fit")]
Nproc = Annotated[int | None, typer.Option(min=1, help="Worker processes (default: one per GPU, or 1 on CPU)")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts")]
Model = Annotated[str, typer.Argument(help="Run folder, model folder, built-in name or hub id")]
AtStep = Annotated[
    str | None,
    typer.Option(
        "--step",
        metavar="N|best",
        help="Use a checkpoint of the run instead of final/; best has the lowest held-out loss",
    ),
]
Trust = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Let Python code from the model's folder or hub repository run"),
]
RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="output_dir of a launched run")]


def step_of(text: str | None) -> int | Literal["best"] | None:
    """The value of `AtStep`. Raises UserError."""
    if text is None:
        return None
    if text == "best":
        return "best"
    if not text.isdecimal():
        raise UserError(f"--step={text}: should be the number of a step, or best.")
    return int(text)
