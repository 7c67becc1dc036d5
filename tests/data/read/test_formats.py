"""Five formats become one kind of sample; errors name the record."""

import json

import pytest

from ft_dist.config.schema import SourceConfig
from ft_dist.data.read.formats import Sample, format_of, read_samples
from ft_dist.data.read.text_files import Record
from ft_dist.errors import DataError

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}


def sample(columns: dict[str, str] | None = None, **fields) -> Sample:
    record = Record(fields, "FILE line 7")
    return format_of(SourceConfig(path="FILE", columns=columns or {}), record).sample(record)


@pytest.mark.parametrize(
    "fields, format_, messages",
    [
        ({"messages": [SYSTEM, USER, ASSISTANT]}, "chat", [SYSTEM, USER, ASSISTANT]),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ASSISTANT]},
            "chat",
            [USER, ASSISTANT],
        ),
        ({"messages": [{**USER, "name": None}, ASSISTANT], "id": 4}, "chat", [USER, ASSISTANT]),
        ({"prompt": "q", "completion": "a"}, "prompt_completion", [USER, ASSISTANT]),
        ({"prompt": "q", "completion": "a", "system": "s"}, "prompt_completion", [SYSTEM, USER, ASSISTANT]),
        ({"prompt": [SYSTEM, USER], "completion": [ASSISTANT]}, "prompt_completion", [SYSTEM, USER, ASSISTANT]),
        ({"instruction": "q", "input": "", "output": "a"}, "alpaca", [USER, ASSISTANT]),
        (
            {"instruction": "q", "input": "i", "output": "a", "system": "s"},
            "alpaca",
            [SYSTEM, {"role": "user", "content": "q\n\ni"}, ASSISTANT],
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            "sharegpt",
            [USER, ASSISTANT],
        ),
        ({"conversations": [USER, ASSISTANT]}, "sharegpt", [USER, ASSISTANT]),
    ],
)
def test_formats_become_messages(fields, format_, messages):
    got = sample(**fields)
    assert got.format == format_
    assert got.messages == messages
    assert got.where == "FILE line 7"


def test_text_and_tools():
    assert sample(text="the thing").text == "the thing"
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert sample(messages=[USER, ASSISTANT], tools=tools).tools == tools
    assert sample(messages=[USER, ASSISTANT], tools=json.dumps(tools)).tools == tools
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    got = sample(messages=[USER, call, {"role": "tool", "content": "4"}, ASSISTANT])
    assert [turn["content"] for turn in got.messages or []] == ["q", "", "4", "a"]


def test_columns_map_our_names_to_the_files():
    got = sample({"prompt": "text", "completion": "category"}, text="q", category="a")
    assert (got.format, got.messages) == ("prompt_completion", [USER, ASSISTANT])
    with pytest.raises(DataError, match=r"FILE line 7: no column 'question' \(columns\.prompt\); the columns are text"):
        sample({"prompt": "question"}, text="q")
    with pytest.raises(DataError, match=r"columns: 'promt' is not one of messages"):
        sample({"promt": "text"}, text="q")


FAULTS = [
    (
        {"question": "q", "answer": "a"},
        r"unknown format, keys are question, answer\. Known formats need chat: messages;",
    ),
    ({"messages": [USER]}, "no assistant turn"),
    ({"messages": [SYSTEM]}, "no assistant turn"),
    ({"messages": []}, "messages is empty"),
    ({"messages": None}, "messages is null, but should be a list"),
    ({"messages": "hi"}, "messages is text, but should be a list"),
    ({"messages": ["hi"]}, r"messages\[0\] must have the form \{role, content\}"),
    ({"messages": [{"role": "bot", "content": "q"}, ASSISTANT]}, r'messages\[0\]\.role="bot": should be one of system'),
    ({"messages": [{"role": ["user"], "content": "q"}, ASSISTANT]}, r"messages\[0\]\.role="),
    ({"messages": [USER, {"role": "assistant", "content": None}]}, r"messages\[1\] \(assistant\): content is null"),
    ({"messages": [USER, {"role": "assistant"}]}, r"messages\[1\] \(assistant\): content is null"),
    ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, r"content is empty"),
    ({"messages": [USER, {"role": "assistant", "content": 7}]}, r"content is a number \(7\), but should be text"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}, ASSISTANT]}, "a part that is not text"),
    ({"messages": [USER, SYSTEM, ASSISTANT]}, "turn 2 is system, but only the first may be"),
    ({"messages": [ASSISTANT, USER, ASSISTANT]}, "an assistant turn comes before any user turn"),
    ({"messages": [USER, {"role": "tool", "content": "x"}, ASSISTANT]}, "turn 2 is tool"),
    ({"conversations": [{"from": "dog", "value": "x"}]}, r'conversations\[0\]\.from="dog": should be one of human'),
    ({"conversations": [{"from": "human"}]}, r"conversations\[0\] must have the form \{from, value\}"),
    ({"conversations": []}, "conversations is an empty list"),
    ({"prompt": "q", "completion": ""}, "completion is empty"),
    ({"prompt": None, "completion": "a"}, "prompt is null"),
    ({"prompt": "q", "completion": 3}, r"completion is a number \(3\)"),
    ({"instruction": "q", "output": None}, "output is null"),
    ({"text": ""}, "text is empty"),
    ({"text": None}, "text is null"),
    ({"messages": [USER, ASSISTANT], "tools": "x"}, "tools is text that is not JSON"),
]


@pytest.mark.parametrize("fields, message", FAULTS)
def test_a_fault_is_one_line_with_its_position(fields, message):
    with pytest.raises(DataError, match=message) as raised:
        sample(**fields)
    assert str(raised.value).startswith("FILE line 7: ")
    assert "\n" not in str(raised.value)


def test_the_first_record_decides_the_format(tmp_path):
    path = tmp_path / "mixed.jsonl"
    rows = [{"prompt": "q", "completion": "a"}, {"messages": [USER, ASSISTANT]}]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(
        DataError, match=r"line 2: a chat record in a source of format prompt_completion \(detected from"
    ):
        list(read_samples(SourceConfig(path=str(path))))
    path.write_text("\n".join(json.dumps(row) for row in [rows[0], {"prompt": "q"}]))
    with pytest.raises(
        DataError, match=r"line 2: no completion \(keys are prompt\); format prompt_completion is detec"
    ):
        list(read_samples(SourceConfig(path=str(path))))


def test_format_from_the_config_is_not_guessed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "q", "completion": "a", "text": "t"}))
    (got,) = read_samples(SourceConfig(path=str(path), format="text"))
    assert got.text == "t"
    with pytest.raises(DataError, match=r"line 1: a prompt_completion record in a source of format chat \(set in the"):
        list(read_samples(SourceConfig(path=str(path), format="chat")))
