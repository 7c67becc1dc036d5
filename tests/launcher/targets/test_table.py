"""The table of targets and the classes it names agree."""

import pytest

from ft_dist.launcher.targets.table import TARGETS, find_target


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_has_a_class_of_that_name(name):
    assert find_target(name).name == name
