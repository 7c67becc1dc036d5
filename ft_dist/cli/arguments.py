"""Arguments and options that several verbs share."""

from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[str, typer.Argument(help="YAML file, or the name of a shipped recipe such as smoke")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Override config keys")]
Force = Annotated[bool, typer.Option("--force", help="Start even if the memory plan says that the run does not fit")]
Nproc = Annotated[int | None, typer.Option(min=1, help="Worker processes (default: one per GPU, or 1 on CPU)")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts")]
Model = Annotated[str, typer.Argument(help="Run folder, model folder, built-in name or hub id")]
RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="output_dir of a launched run")]
