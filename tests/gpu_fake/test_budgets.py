"""What a step costs on the simulated GPU stays within `budgets.yaml`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ft_dist_kernels.backend import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="no Triton here: its wheels exist for Linux only")

BUDGETS: dict[str, dict[str, float]] = yaml.safe_load(Path(__file__).with_name("budgets.yaml").read_text())


@pytest.mark.parametrize("name", BUDGETS)
def test_a_step_stays_within_its_budget(name: str, simulated: Callable[..., Any]) -> None:
    budget = dict(BUDGETS[name])
    off_plan = budget.pop("off_plan_by", None)
    report = simulated("report", *name.split())
    over = {key: f"{report[key]:g} > {limit:g}" for key, limit in budget.items() if report[key] > limit}
    assert not over, f"{over}; waits: {report['waits']}; a layer: {report['layer']}"
    if off_plan is not None:
        saved, planned = report["saved_mib_a_layer"], report["planned_mib_a_layer"]
        assert abs(saved / planned - 1) <= off_plan, f"a layer saves {saved:.1f} MiB, the plan says {planned:.1f}"
