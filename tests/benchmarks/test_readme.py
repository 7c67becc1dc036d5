"""The tables come from the result files and list what was not measured; a worse ratio is a regression."""

from typing import Any

import pytest

from benchmarks.peers.compare import summary
from benchmarks.readme import BEGIN, END, block, comparison, main, replaced
from benchmarks.training.quick import regressions
from tests.benchmarks.test_compare import turn

WORK = {"model": "m", "method": "lora", "dtype": "fp32", "rows_a_step": 8, "data": "train.csv"}


def report(date: str, rate: float) -> dict[str, Any]:
    taken = {"ours": [turn(100, 2.5)], "ours packed": [turn(150, 2.7)], "trl": [turn(rate, 2.5)], "odd": [turn(9, 3)]}
    found = summary(taken, dtype="fp32")
    return {"kind": "peers", "date": date, "work": WORK, "failures": {"axolotl": "no wheel"}, "turns": taken, **found}


def test_the_newest_file_counts_and_gaps_are_reported() -> None:
    text = block([report("2026-01-01", 10), report("2026-02-02", 50)])
    case = "m lora fp32, 8 rows of train.csv per step, 1 turn"
    assert f"| 2026-02-02 | {case} | trl | 3.00 (2.00) | 1.00 | 1.00 |" in text
    assert "2026-01-01" not in text
    assert f"Not measured: axolotl ({case}): no wheel" in text
    assert f"odd ({case}) did different work: first loss 3.00000, ours 2.50000" in text
    assert "Not measured: llamafactory, ms-swift, litgpt, torchtune." in text
    assert text.endswith("Not measured: no comparison with peers on a GPU yet.")


def test_fewer_peers_do_not_hide_the_others() -> None:
    of_two = report("2026-02-02", 50)
    alone = {name: side for name, side in of_two["sides"].items() if name != "odd"}
    text = block([report("2026-01-01", 10), of_two | {"sides": alone}])
    assert "2026-01-01" in text
    assert "2026-02-02" in text


def test_only_the_text_between_the_markers_changes() -> None:
    assert replaced(f"a\n{BEGIN}\nold\n{END}\nb", "new") == f"a\n{BEGIN}\nnew\n{END}\nb"
    with pytest.raises(SystemExit, match="each of these lines once"):
        replaced("no markers", "new")


def test_the_comparison_has_one_row_per_trainer() -> None:
    two_turns = report("2026-01-01", 10)
    two_turns["turns"] = {name: turns * 2 for name, turns in two_turns["turns"].items()}
    lines = comparison([two_turns, report("2026-02-02", 50)]).splitlines()
    assert len(lines) == 2 + 6
    assert lines[2] == "| trl | 15.00 | 1.00 | 1.00 |  |  |  |", "more turns count for more than a newer date"
    assert lines[7] == "| axolotl |  |  |  |  |  |  |"


def test_the_pages_are_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["readme", "--check"])
    assert main() == 0, "run python -m benchmarks.readme"


def test_a_ratio_that_got_worse_is_a_regression() -> None:
    before = {"lora_tokens_per_s": 2.0, "lora_peak": 0.5, "help_over_import_torch": 0.2}
    assert regressions(before, {"lora_tokens_per_s": 1.9, "lora_peak": 0.45, "help_over_import_torch": 0.1}) == []
    worse = regressions(before, {"lora_tokens_per_s": 1.5, "lora_peak": 0.7, "help_over_import_torch": 0.2})
    assert [line.partition(":")[0] for line in worse] == ["lora_peak", "lora_tokens_per_s"]
