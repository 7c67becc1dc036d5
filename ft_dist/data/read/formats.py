"""Turn a record of any accepted shape into one `Sample`: a conversation, or plain text.

| format            | keys                                                                                    |
|-------------------|-----------------------------------------------------------------------------------------|
| chat              | messages: [{role, content}], content a string or a list of text parts; tools            |
| prompt_completion | prompt and completion: strings, or lists of messages; system                            |
| alpaca            | instruction, output; input, system                                                      |
| sharegpt          | conversations: [{from, value}], from human/user, gpt/assistant, system or tool; tools   |
| text              | text                                                                                    |
| tokens            | tokens: ids of this model's tokenizer, all of them labelled (tokenised elsewhere)       |

`source.columns` maps our keys to the columns' names first. The format is detected from the first record and applies to
the whole source.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ft_dist.config.schema import DataFormat, SourceConfig
from ft_dist.data.read.sources import read_records
from ft_dist.data.read.text_files import Record, check_depth, is_text, names_of
from ft_dist.errors import DataError


@dataclass(frozen=True, slots=True)
class Sample:
    """A checked record: `messages` ([{role, content}], content never empty), `text` or `tokens` is set."""

    messages: list[dict[str, Any]] | None
    text: str | None
    where: str
    format: DataFormat = "chat"
    tools: list[dict[str, Any]] | None = None
    tokens: list[int] | None = None


REQUIRED: dict[DataFormat, tuple[str, ...]] = {
    "chat": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "sharegpt": ("conversations",),
    "text": ("text",),
    "tokens": ("tokens",),
}
OUR_KEYS = (*(key for keys in REQUIRED.values() for key in keys), "input", "system", "tools")
ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


@dataclass(frozen=True, slots=True)
class RecordFormat:
    """How the records of one source become samples: set by the config, or detected from the first record."""

    format: DataFormat
    columns: dict[str, str]
    first: str = ""
    """Place of the record that the format was detected from; "" if the config sets it"""

    def sample(self, record: Record) -> Sample:
        """Raises DataError with file and line for an invalid record."""
        return _build(_rename(record, self.columns), record.where, self.format, self.first)


def format_of(source: SourceConfig, first: Record) -> RecordFormat:
    """The format of a source whose first record this is. Raises DataError if no format matches."""
    if source.format != "auto":
        return RecordFormat(source.format, source.columns)
    return RecordFormat(_detect(_rename(first, source.columns), first.where), source.columns, first.where)


def read_samples(source: SourceConfig, *, limit: int | None = None) -> Iterator[Sample]:
    """The checked samples of a source, its format taken from the config or the first record.

    Raises DataError with file and line at the first invalid record.
    """
    record_format: RecordFormat | None = None
    for record in read_records(source, limit=limit):
        record_format = record_format or format_of(source, record)
        yield record_format.sample(record)


def _detect(fields: dict[str, Any], where: str) -> DataFormat:
    format_ = _match(fields)
    if format_ is not None:
        return format_
    expected = "; ".join(f"{name}: {', '.join(keys)}" for name, keys in REQUIRED.items())
    seen = names_of(fields)
    raise DataError(
        f"{where}: unknown format, keys are {seen}. Known formats need {expected}. "
        "Rename the keys or map them with columns, for example columns={prompt: question, completion: answer}."
    )


def _match(fields: dict[str, Any]) -> DataFormat | None:
    for name, keys in REQUIRED.items():
        if all(key in fields for key in keys):
            return name
    return None


def _rename(record: Record, columns: dict[str, str]) -> dict[str, Any]:
    if not columns:
        return record.fields
    for ours, theirs in columns.items():
        if ours not in OUR_KEYS:
            raise DataError(f"columns: {ours!r} is not one of {', '.join(OUR_KEYS)}. Use {{ours: theirs}}.")
        if theirs not in record.fields:
            seen = names_of(record.fields)
            raise DataError(f"{record.where}: no column {theirs!r} (columns.{ours}); the columns are {seen}.")
    taken = set(columns.values())
    fields = {key: value for key, value in record.fields.items() if key not in taken}
    fields.update({ours: record.fields[theirs] for ours, theirs in columns.items()})
    return fields


def _build(fields: dict[str, Any], where: str, format_: DataFormat, first: str) -> Sample:
    lacking = [key for key in REQUIRED[format_] if key not in fields]
    if lacking:
        _raise_other_format(fields, where, format_, first, lacking)
    tools = _tools(fields.get("tools"), where)
    if format_ == "text":
        return Sample(None, _string(fields["text"], "text", where), where, "text")
    if format_ == "tokens":
        return Sample(None, None, where, "tokens", tokens=_token_ids(fields["tokens"], where))
    if format_ == "chat":
        messages = _messages(fields["messages"], "messages", where)
    elif format_ == "sharegpt":
        messages = _sharegpt(fields["conversations"], where)
    elif format_ == "alpaca":
        messages = _alpaca(fields, where)
    else:
        messages = _prompt_completion(fields, where)
    _check_order(messages, where)
    return Sample(messages, None, where, format_, tools)


def _raise_other_format(fields: dict[str, Any], where: str, format_: str, first: str, lacking: list[str]) -> None:
    other = _match(fields)
    origin = f"detected from {first}" if first else "set in the config"
    if other is None:
        seen = names_of(fields)
        raise DataError(f"{where}: no {' and no '.join(lacking)} (keys are {seen}); format {format_} is {origin}.")
    raise DataError(
        f"{where}: a {other} record in a source of format {format_} ({origin}). "
        "A source has one format: split the file in two."
    )


def _token_ids(value: Any, where: str) -> list[int]:
    ids = value.tolist() if hasattr(value, "tolist") else value  # numpy comes from binary formats
    if not isinstance(ids, list) or not all(type(token) is int and token >= 0 for token in ids):
        raise DataError(f"{where}: tokens is {_kind(ids)}, but should be a list of token ids.")
    if not ids:
        raise DataError(f"{where}: tokens is empty. Remove the record.")
    return ids


def _messages(value: Any, key: str, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list | tuple):
        raise DataError(f"{where}: {key} is {_kind(value)}, but should be a list of {{role, content}}.")
    if not value:
        raise DataError(f"{where}: {key} is empty. Add at least a user and an assistant turn, or remove the record.")
    return [_message(message, f"{where}: {key}[{index}]") for index, message in enumerate(value)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict) or "role" not in message:
        raise DataError(f"{where} must have the form {{role, content}}.")
    role = message["role"]
    if role not in ROLES:
        raise DataError(f"{where}.role={_short(role)}: should be one of {', '.join(ROLES)}.")
    kept = {key: value for key, value in message.items() if value is not None}
    content = kept.get("content")
    if role == "assistant" and kept.get("tool_calls") and not content:
        kept["content"] = ""
        return kept
    kept["content"] = _string(_join_parts(content, where), "content", f"{where} ({role})")
    return kept


def _join_parts(content: Any, where: str) -> Any:
    """OpenAI's list form of content; only text parts are supported."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            raise DataError(f"{where}.content holds a part that is not text: {_short(part)}. Keep text parts only.")
        texts.append(part["text"])
    return "".join(texts)


def _sharegpt(value: Any, where: str) -> list[dict[str, Any]]:
    if isinstance(value, list) and value and isinstance(value[0], dict) and "role" in value[0]:
        return _messages(value, "conversations", where)
    if not isinstance(value, list | tuple) or not value:
        raise DataError(f"{where}: conversations is {_kind(value)}, but should be a list of {{from, value}}.")
    messages = []
    for index, turn in enumerate(value):
        place = f"{where}: conversations[{index}]"
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            raise DataError(f"{place} must have the form {{from, value}}.")
        role = _SHAREGPT_ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
        if role is None:
            raise DataError(f"{place}.from={_short(turn['from'])}: should be one of {', '.join(_SHAREGPT_ROLES)}.")
        messages.append({"role": role, "content": _string(turn["value"], "value", f"{place} ({turn['from']})")})
    return messages


def _alpaca(fields: dict[str, Any], where: str) -> list[dict[str, Any]]:
    prompt = _string(fields["instruction"], "instruction", where)
    if fields.get("input"):
        prompt += "\n\n" + _string(fields["input"], "input", where)
    answer = _string(fields["output"], "output", where)
    return [*_system(fields, where), {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _prompt_completion(fields: dict[str, Any], where: str) -> list[dict[str, Any]]:
    sides = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        value = fields[key]
        if isinstance(value, list):
            sides.append(_messages(value, key, where))
        else:
            sides.append([{"role": role, "content": _string(value, key, where)}])
    return [*_system(fields, where), *sides[0], *sides[1]]


def _system(fields: dict[str, Any], where: str) -> list[dict[str, Any]]:
    return [{"role": "system", "content": _string(fields["system"], "system", where)}] if fields.get("system") else []


def _tools(value: Any, where: str) -> list[dict[str, Any]] | None:
    """Tool descriptions, for templates that use them; ShareGPT files often store them as a JSON string."""
    if not value:
        return None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise DataError(f"{where}: tools is text that is not JSON. Use a list of tool descriptions.") from None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DataError(f"{where}: tools is {_kind(value)}, but should be a list of objects.")
    check_depth(value, where)
    return value


def _check_order(messages: list[dict[str, Any]], where: str) -> None:
    """The rules that all chat templates share; rules of a single template show when it renders."""
    previous = ""
    for index, message in enumerate(messages):
        role = message["role"]
        if role in ("system", "developer") and index > 0:
            raise DataError(f"{where}: turn {index + 1} is {role}, but only the first may be. Move or remove it.")
        if role == "assistant" and previous in ("", "system", "developer"):
            raise DataError(f"{where}: an assistant turn comes before any user turn. Add a user turn first.")
        if role == "tool" and previous not in ("assistant", "tool"):
            raise DataError(f"{where}: turn {index + 1} is tool, but no assistant turn comes before it.")
        previous = role
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{where}: no assistant turn, so there is nothing to train on. Add the answer, or remove it.")


def _string(value: Any, key: str, where: str) -> str:
    if value is None:
        raise DataError(f"{where}: {key} is null. Add text, or remove the record.")
    if not isinstance(value, str):
        raise DataError(f"{where}: {key} is {_kind(value)} ({_short(value)}), but should be text.")
    if not value.strip():
        raise DataError(f"{where}: {key} is empty. Add text, or remove the record.")
    if not is_text(value):
        raise DataError(f"{where}: {key} holds half of a surrogate pair, which is no text. Fix or remove the record.")
    return value


def _kind(value: Any) -> str:
    names = {"NoneType": "null", "dict": "an object", "list": "a list", "str": "text", "int": "a number"}
    name = type(value).__name__
    return "an empty list" if value == [] else names.get(name, name)


def _short(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
