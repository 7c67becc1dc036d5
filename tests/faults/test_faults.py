"""The matrix as tests: a selection of about three minutes, all kinds behind `slow`. `make faults-matrix` runs all."""

import json
import os
import shutil

import pytest

from tests.faults.kinds import KINDS
from tests.faults.page import PAGE, PHASES, RESULT, page
from tests.faults.prepared import Prepared
from tests.faults.verdict import judge

SELECTION = [
    "commit-write-enospc",
    "commit-retention-eio",
    "kill-after-rename",
    "metrics-eio-always",
    "stdout-closed",
    "resume-read-estale",
    "resume-read-eio",
    "damaged-all",
    "damaged-version",
    "damaged-cut-publish",
    "mirror-own-folder",
    "mirror-of-another-run",
    "sighup-launcher",
    "recipe-edited",
    "final-write-enospc",
]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Shared by the workers of one session."""
    base = tmp_path_factory.getbasetemp()
    return Prepared((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "faults-prepared")


def marked(name: str) -> object:
    return pytest.param(name, marks=pytest.mark.faults if name in SELECTION else pytest.mark.slow)


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
@pytest.mark.parametrize("name", [marked(name) for name in KINDS])
def test_nothing_is_lost(name: str, prepared: Prepared, tmp_path) -> None:
    kind = KINDS[name]
    if kind.root_only and os.geteuid() != 0:
        pytest.skip("mounting needs root")
    verdict = judge(kind, prepared, tmp_path / "scene")
    assert verdict.problems == []


def test_there_are_kinds_for_every_phase() -> None:
    assert len(KINDS) >= 40
    assert {kind.phase for kind in KINDS.values()} == set(PHASES)


def test_the_page_is_in_step_with_the_result() -> None:
    """`python -m tests.faults` writes both."""
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    assert PAGE.read_text(encoding="utf-8") == page(result)
    assert set(result["rows"]) == set(KINDS)
