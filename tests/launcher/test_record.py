"""launch.json as others may leave it: torn, of another version, or made up."""

import json

import pytest

from ft_dist.errors import UserError
from ft_dist.launcher.launch import status
from ft_dist.launcher.record import new_record, read_record


def test_a_record_is_read_back(tmp_path):
    record = new_record(target="local", job="1@2", command=["true"], log=None)
    record.write(tmp_path)
    assert read_record(tmp_path) == record
    path = tmp_path / "launch.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"of a later version": 1}))
    assert read_record(tmp_path) == record


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"\xff",
        b"[]",
        b"[" * 200_000,
        b"{}",
        b'{"target": "local", "job": 5, "command": [], "log": null, "submitted_at": 0}',
        b'{"target": "local", "job": "1@2", "command": "rm -r x", "log": null, "submitted_at": 0}',
        b'{"target": "local", "job": "1@2", "command": [], "log": 3, "submitted_at": NaN}',
    ],
)
def test_a_damaged_record_is_one_line(tmp_path, text):
    (tmp_path / "launch.json").write_bytes(text)
    with pytest.raises(UserError) as raised:
        status(tmp_path)
    assert str(raised.value).startswith(f"{tmp_path / 'launch.json'}: ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("job", ["x@1", "@1", "-1@1", "\u00b2@1", f"{'9' * 5000}@1", ""])
def test_a_job_that_is_no_process_is_refused(tmp_path, job):
    new_record(target="local", job="1@2", command=["true"], log=None).write(tmp_path)
    path = tmp_path / "launch.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"job": job}))
    with pytest.raises(UserError, match=r"launch\.json: job"):
        status(tmp_path)
