"""The short form of `make chaos`."""

import os

import pytest

from tests.chaos.storm import Storm

pytestmark = pytest.mark.faults


def test_twelve_kills_lose_nothing(tmp_path):
    """FT_DIST_CHAOS_SEED sets another seed."""
    storm = Storm(kills=12, seed=int(os.environ.get("FT_DIST_CHAOS_SEED", "5")), folder=tmp_path)
    storm.run()
    assert storm.struck == 12
    # a storm that no longer hits commits would prove little
    assert storm.hits["in a commit"] >= 3
