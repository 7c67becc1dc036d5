"""Find the characters of a rendered conversation that the model has to write.

A template is opaque Jinja, and most have no `{% generation %}` marks, so the text is compared with renders whose
difference is known. First choice: a skeleton, the render of the same roles with a sentinel for every content, built
once per sequence of roles. If the text equals the skeleton with the contents inserted, character by character, the
spans follow directly. Templates that inspect the content (and split off or drop reasoning) differ; they are searched
turn by turn with renders of the prefixes.

A span runs from the end of the generation prompt to the end of the turn's end token. It includes reasoning marks that
the template writes for the model (`<think>\\n\\n</think>\\n\\n` of Qwen3), because the model has to write them too, but
not the newline after the end token. An earlier turn that the template rewrites (dropping its reasoning) would teach an
answer that is not in the data: it gets no span and is counted in `rewritten`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Messages = list[dict[str, Any]]
Render = Callable[[Messages, bool], str]
"""(messages, add_generation_prompt) -> text"""

_SENTINEL = "ftdist{}sentinel"
_SENTINEL_PATTERN = re.compile(r"ftdist(\d+)sentinel")


@dataclass(slots=True)
class Spans:
    """Character ranges [start, end) to train on, in order, in the rendered text."""

    text: str
    ranges: list[tuple[int, int]]
    rewritten: int = 0
    """Assistant turns that the template rewrites; they are not trained on"""
    ends_with_token: bool = True
    """Whether the last labelled turn ends with a special token of the template"""
    plain: bool = False
    """Plain text, not rendered by a template"""


@dataclass(frozen=True, slots=True)
class TurnMarks:
    """Constants of one tokenizer: the generation prompt and the tokens that can end a turn."""

    generation_prompt: str
    end_token: re.Pattern[str] | None

    def close(self, text: str, content_end: int) -> tuple[int, bool]:
        """End of the turn whose content ends here, and whether it has an end token."""
        match = self.end_token.match(text, content_end) if self.end_token else None
        return (match.end(), True) if match else (content_end, False)


def find_marks(render: Render, added_tokens: list[str]) -> TurnMarks:
    """Probe a template once: what `add_generation_prompt` appends, and which tokens can end a turn."""
    probe = [{"role": "user", "content": "x"}]
    without, with_prompt = render(probe, False), render(probe, True)
    common = 0
    for a, b in zip(without, with_prompt, strict=False):
        if a != b:
            break
        common += 1
    tokens = sorted((token for token in added_tokens if token.strip()), key=len, reverse=True)
    pattern = re.compile(r"\s*(?:" + "|".join(map(re.escape, tokens)) + ")") if tokens else None
    return TurnMarks(with_prompt[common:], pattern)


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A rendered conversation split at its contents: text, then (turn, text after its content) in order."""

    before: str
    contents: tuple[tuple[int, str], ...]


def make_skeleton(messages: Messages, render: Render) -> Skeleton | None:
    """None if a content is empty, or does not appear exactly once for each assistant turn."""
    if any(not message.get("content") or message.get("tool_calls") for message in messages):
        return None
    text = render([{**message, "content": _SENTINEL.format(index)} for index, message in enumerate(messages)], False)
    before, *parts = _SENTINEL_PATTERN.split(text)
    contents = tuple((int(parts[at]), parts[at + 1]) for at in range(0, len(parts), 2))
    shown = [index for index, _ in contents]
    once = all(shown.count(index) == 1 for index, m in enumerate(messages) if m["role"] == "assistant")
    return Skeleton(before, contents) if once else None


def find_spans(messages: Messages, text: str, skeleton: Skeleton | None, *, render: Render, marks: TurnMarks) -> Spans:
    """Spans of a rendered conversation. Calls `render` again only if the skeleton does not match."""
    contents = _match_skeleton(messages, text, skeleton) if skeleton is not None else None
    if contents is None:
        spans = _search_turns(messages, text, render=render, marks=marks)
    else:
        spans = Spans(text, [], ends_with_token=False)
        for index, (start, end) in contents:
            start = _prompt_end(messages, index, text, start, render=render, marks=marks)
            end, spans.ends_with_token = marks.close(text, end)
            spans.ranges.append((start, end))
    if messages[-1]["role"] == "assistant" and spans.ranges and not spans.ends_with_token:
        # a template that ends turns with words ("### End"): the model has to write them to stop
        spans.ranges[-1] = (spans.ranges[-1][0], max(spans.ranges[-1][1], len(text.rstrip())))
    return spans


def _match_skeleton(messages: Messages, text: str, skeleton: Skeleton) -> list[tuple[int, tuple[int, int]]] | None:
    """(turn, range of its content) for each assistant turn, if the text is the skeleton with the contents inserted."""
    if not text.startswith(skeleton.before):
        return None
    found = []
    cursor = len(skeleton.before)
    for index, after in skeleton.contents:
        content = messages[index]["content"]
        # templates trim contents on both sides, or on one
        for variant in (content, content.strip(), content.lstrip(), content.rstrip()):
            if text.startswith(variant, cursor) and text.startswith(after, cursor + len(variant)):
                break
        else:
            return None
        if messages[index]["role"] == "assistant":
            found.append((index, (cursor, cursor + len(variant))))
        cursor += len(variant) + len(after)
    return found if cursor == len(text) else None


def _prompt_end(
    messages: Messages, index: int, text: str, content_start: int, *, render: Render, marks: TurnMarks
) -> int:
    """Where the model starts to write turn `index`: the end of its generation prompt."""
    prompt = marks.generation_prompt
    if not prompt or text.endswith(prompt, 0, content_start):
        return content_start
    prefix = render(messages[:index], True)
    return len(prefix) if len(prefix) <= content_start and text.startswith(prefix) else content_start


def _search_turns(messages: Messages, text: str, *, render: Render, marks: TurnMarks) -> Spans:
    """Turn by turn: find the content between the render up to its generation prompt and that up to the next turn's."""
    spans = Spans(text, [], ends_with_token=False)
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    prompts = {index: render(messages[:index], True) for index in turns}
    starts = {index: len(prompt) for index, prompt in prompts.items() if text.startswith(prompt)}
    cursor = 0
    for number, index in enumerate(turns):
        bound = next((starts[later] for later in turns[number + 1 :] if later in starts), len(text))
        found = None
        if index in starts:
            found = _turn_range(messages, index, text, starts[index], bound, render=render, marks=marks)
        else:
            found = _only_occurrence(messages[index].get("content", ""), text, cursor, bound, marks)
        if found is None:
            spans.rewritten += 1
            continue
        start, end, spans.ends_with_token = found
        spans.ranges.append((start, end))
        cursor = end
    return spans


def _turn_range(
    messages: Messages, index: int, text: str, start: int, bound: int, *, render: Render, marks: TurnMarks
) -> tuple[int, int, bool] | None:
    """(start, end, closed by a token) of a turn that starts at `start` and ends before `bound`."""
    content = messages[index].get("content", "").strip()
    if content:
        position = text.find(content, start, bound)
        if position >= 0:
            return (start, *marks.close(text, position + len(content)))
    # Reasoning or tool calls in the template's own form: the turn as rendered when it is the last one.
    turn = render(messages[: index + 1], False)
    if not turn.startswith(text[:start]):
        return None
    written = turn[start:].rstrip()
    if not written or not text.startswith(written, start):
        return None
    end = start + len(written)
    closed = marks.end_token is not None and any(
        match.end() == len(written) for match in marks.end_token.finditer(written)
    )
    return start, end, closed


def _only_occurrence(
    content: str, text: str, cursor: int, bound: int, marks: TurnMarks
) -> tuple[int, int, bool] | None:
    """The content's place if it occurs exactly once; guessing among several could label the user's words."""
    content = content.strip()
    if not content or text.count(content, cursor, bound) != 1:
        return None
    position = text.index(content, cursor, bound)
    return (position, *marks.close(text, position + len(content)))
