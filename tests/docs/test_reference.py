"""The generated pages match the code."""

import pytest

from benchmarks.plan.__main__ import plot
from docs.generate import REFERENCE, pages
from ft_dist.config.schema import RunConfig
from tests.conftest import ROOT


@pytest.mark.parametrize("name", ["cli.md", "config.md"])
def test_the_reference_is_up_to_date(name: str) -> None:
    assert (REFERENCE / name).read_text(encoding="utf-8") == pages()[name], "run python docs/generate.py"


def test_every_section_and_verb_is_there() -> None:
    commands, config = pages()["cli.md"], pages()["config.md"]
    assert all(f"## ft-dist {verb}\n" in commands for verb in ("train", "launch", "checkpoint verify", "schema"))
    assert all(f"## {name}" in config or f"| `{name}` |" in config for name in RunConfig.model_fields)


def test_the_plot_matches_the_plan() -> None:
    """`python -m benchmarks.plan` redraws it."""
    assert (ROOT / "docs" / "plan-scaling.svg").read_text() == plot()
