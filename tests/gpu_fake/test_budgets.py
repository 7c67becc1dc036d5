"""The cost of a step on the simulated GPU stays within `budgets.yaml`."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ft_dist_kernels.backend import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="no Triton here: its wheels exist for Linux only")

BUDGETS: dict[str, dict[str, float]] = yaml.safe_load(Path(__file__).with_name("budgets.yaml").read_text())


def test_a_step_stays_within_its_budget(simulated: Callable[..., Any]) -> None:
    reports = simulated("report", "--budgets")
    assert reports.keys() == BUDGETS.keys()
    over = [line for name, budget in BUDGETS.items() for line in excess(name, budget, reports[name])]
    assert not over, "\n".join(over)


def test_a_budget_can_be_exceeded() -> None:
    report = {"waits_a_step": 3, "waits": ["here"], "layer": {}, "saved_mib_a_layer": 110, "planned_mib_a_layer": 100}
    assert list(excess("a", {"waits_a_step": 3, "off_plan_by": 0.1}, report)) == []
    assert len(list(excess("a", {"waits_a_step": 2, "off_plan_by": 0.09}, report))) == 2


def excess(name: str, budget: dict[str, float], report: dict[str, Any]) -> Iterator[str]:
    """One line per number above its limit."""
    for key, limit in budget.items():
        if key == "off_plan_by":
            saved, planned = report["saved_mib_a_layer"], report["planned_mib_a_layer"]
            if abs(saved / planned - 1) > limit + 1e-9:
                yield f"{name}: a layer saves {saved:.1f} MiB, and the plan says {planned:.1f}"
        elif report[key] > limit + 1e-9:
            detail = report["waits"] if key.startswith("waits") else report["layer"]
            yield f"{name}: {key} is {report[key]:g}, the budget {limit:g}: {detail}"
