"""An error for the user is one printable line, whatever the file held that it repeats."""

import pickle

import pytest

from ft_dist.errors import LONGEST_MESSAGE, DataError, MemoryPlanError


@pytest.mark.parametrize(
    "value, shown", [("a\nb", r"a\nb"), ("\x1b[2J", r"\x1b[2J"), ("\ud800", r"\ud800"), ("é²", "é²")]
)
def test_what_cannot_be_printed_is_escaped(value, shown):
    error = DataError(f"x: {value} is wrong.")
    assert str(error) == f"x: {shown} is wrong."
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_a_long_message_keeps_its_beginning_and_its_end():
    text = str(MemoryPlanError(f"value={'9' * 10**6}: too long. Use less.", short="x"))
    assert len(text) <= LONGEST_MESSAGE
    assert text.startswith("value=999")
    assert text.endswith("too long. Use less.")
