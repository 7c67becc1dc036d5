"""The tuner restores the tables, takes the fastest candidate, and skips candidates that do not launch."""

import pytest
import torch

from benchmarks.kernels.tune import Entry, best, entries

pytestmark = pytest.mark.interpreter


def test_the_fastest_entry_is_found_and_the_table_is_restored(capsys):
    table = {"sm_90": (2048, 4)}
    entry = Entry("glu", "TILES", table, "sm_90", [(1024, 4), (4096, 8), (8192, 16)])
    measured = {(2048, 4): 3.0, (1024, 4): 4.0, (4096, 8): 2.0}

    def seconds():
        if table["sm_90"] == (8192, 16):
            raise RuntimeError("out of resource: shared memory")
        return measured[table["sm_90"]]

    found, times = best(entry, seconds)
    assert found == (4096, 8)
    assert times == {"(2048, 4)": 3.0, "(1024, 4)": 4.0, "(4096, 8)": 2.0}
    assert table == {"sm_90": (2048, 4)}
    assert "RuntimeError" in capsys.readouterr().out


def test_every_table_of_the_kernels_is_covered():
    found = list(entries(torch.device("cpu"), ["glu", "rope", "rms_norm", "linear_cross_entropy", "lora_linear"]))
    assert len(found) == 7
    for entry in found:
        checked_in = entry.table[entry.key]
        assert all(len(candidate) == len(checked_in) for candidate in entry.candidates)
