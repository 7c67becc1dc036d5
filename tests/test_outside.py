import pytest
from pydantic import Field

from ft_dist.errors import CheckpointError, DataError
from ft_dist.outside import Document, check_name, parse_document, parse_json


class Point(Document):
    x: int
    names: dict[int, float | None] = Field(default_factory=dict)


@pytest.mark.parametrize("name", ["a", "a/b.json", "step-00000001/rank-00000.safetensors", "ä b", "..a", "a..b"])
def test_plain_names_are_kept(name):
    assert check_name(name, where="here", error=DataError) == name


@pytest.mark.parametrize(
    "name",
    ["", "/abs", "../x", "a/../../x", "a//b", "./a", "a/", "a\0b", "a\nb", "C:\\x", "x" * 256, None, 3, "\udc80" * 2],
)
def test_names_that_leave_the_folder_are_refused(name):
    with pytest.raises(CheckpointError, match=r"^here: names the file"):
        check_name(name, where="here", error=CheckpointError)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[" * 200_000, b"1" * 5000, b"{} {}", '"\ud800'])
def test_what_is_not_json_is_one_line(text):
    with pytest.raises(DataError, match=r"^here: ") as error:
        parse_json(text, where="here", error=DataError)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["[]", "{}", '{"x": "1"}', '{"x": 1.5}', '{"x": true}', '{"x": 1, "names": {"a": 1}}'])
def test_a_document_of_another_shape_is_one_line(text):
    with pytest.raises(DataError, match=r"^here: ") as error:
        parse_document(text, Point, where="here", error=DataError)
    assert "\n" not in str(error.value)


def test_a_document_keeps_numbers_and_ignores_keys_of_newer_versions():
    found = parse_document('{"x": 1, "names": {"3": null}, "y": 2}', Point, where="here", error=DataError)
    assert (found.x, found.names) == (1, {3: None})
