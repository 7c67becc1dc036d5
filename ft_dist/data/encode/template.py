"""Samples to token ids and label masks, with the tokenizer's chat template.

The text is tokenised once as a whole, so the ids are exactly those of the conversation; the tokenizer's offsets map
characters to tokens (`label_spans.py` finds the characters). A token is labelled if any of its characters is.

Without a chat template, a prompt/completion sample is the concatenation prompt + completion + end token; any other
conversation raises an error. Plain text gets the tokenizer's special tokens and an end token, and every token is
labelled.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2.exceptions import TemplateError

from ft_dist.data.encode.label_spans import (
    Messages,
    Render,
    Skeleton,
    Spans,
    TurnMarks,
    find_marks,
    find_spans,
    make_skeleton,
)
from ft_dist.data.encode.pretokens import PretokenCache
from ft_dist.data.encode.token_bytes import Ids, TokenBytes, token_range
from ft_dist.data.read.formats import Sample
from ft_dist.data.read.text_files import is_text
from ft_dist.errors import DataError, ModelError
from ft_dist.outside import RENDER_SECONDS, RENDERS, TooLongError

DATE = datetime(2024, 7, 26)
"""The date for templates that print today's: prepared data must not depend on the day. Llama 3.1's default."""

_TODAY = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")


@dataclass(slots=True)
class Encoded:
    """Token ids of one sample, and whether each is labelled."""

    tokens: npt.NDArray[np.uint32]
    mask: npt.NDArray[np.bool_]


class Encoder:
    """Encodes samples for one tokenizer; `notes` counts what the report should mention.

    notes: `turns_rewritten` assistant turns that the template rewrites (not labelled), `end_token_added` samples whose
    template ends turns without a token, `system_folded` samples whose system text moved into the user turn,
    `dates_pinned` samples whose template asked for today's date and got DATE.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.notes: Counter[str] = Counter()
        self._template = getattr(tokenizer, "chat_template", None)
        self._backend = getattr(tokenizer, "backend_tokenizer", None) if getattr(tokenizer, "is_fast", False) else None
        self._marks: TurnMarks | None = None
        self._system_role: bool | None = None
        self._skeletons: dict[tuple[str, ...], Skeleton | None] = {}
        self._pinned_templates: dict[str, str] = {}
        self._prints_date = False

    def encode(self, sample: Sample) -> Encoded:
        return self.encode_batch([sample])[0]

    def encode_batch(self, samples: Sequence[Sample]) -> list[Encoded]:
        """Encode samples in one batch, over the tokenizer's threads.

        Raises DataError naming a record that the template rejects, ModelError if a required template is missing.
        """
        return self.tokenise([self.render(sample) for sample in samples])

    def render(self, sample: Sample) -> Spans:
        """The text of a sample and its labelled characters; not for samples of token ids."""
        if sample.messages is None:
            assert sample.text is not None
            return Spans(sample.text, [(0, len(sample.text))], plain=True)
        if self._template is None:
            return self._concatenate(sample)
        messages = self._fold_system(sample.messages)
        render = partial(self._render, tools=sample.tools)
        if self._marks is None:
            self._marks = self._find_marks()
        try:
            text = render(messages, False)
            skeleton = self._skeleton(messages, sample.tools, render)
            spans = find_spans(messages, text, skeleton, render=render, marks=self._marks)
        except TemplateError as error:
            raise DataError(
                f"{sample.where}: the chat template rejects this conversation ({error}). Fix the record, "
                "or set model.chat_template."
            ) from None
        self.notes["turns_rewritten"] += spans.rewritten
        self.notes["dates_pinned"] += self._prints_date
        return spans

    @cached_property
    def _token_bytes(self) -> TokenBytes | None:
        """Built when the first text is encoded for training, because it walks the whole vocabulary."""
        return TokenBytes.of(self._backend) if self._backend is not None else None

    @cached_property
    def _pretokens(self) -> PretokenCache | None:
        return PretokenCache.of(self._backend) if self._backend is not None else None

    def tokenise(self, rendered: Sequence[Spans]) -> list[Encoded]:
        """Token ids and masks of rendered texts, in order."""
        plain = iter(self._encode_plain([spans for spans in rendered if spans.plain]))
        chats = iter(self._encode_chats([spans for spans in rendered if not spans.plain]))
        return [next(plain if spans.plain else chats) for spans in rendered]

    def encode_prompt(self, messages: Messages, tools: list[dict[str, Any]] | None = None) -> list[int]:
        """Token ids up to the start of the model's answer, for generation."""
        if self._template is None:
            prompt = "".join(message["content"] for message in messages)
            return list(self.tokenizer(prompt)["input_ids"])
        try:
            text = self._render(self._fold_system(messages), True, tools=tools)
        except TemplateError as error:
            raise DataError(f"the chat template rejects this conversation ({error}). Fix its turns.") from None
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _render(self, messages: Messages, add_generation_prompt: bool, tools: Any = None) -> str:
        """Raises TemplateError, whatever a template does: it is a program, and not one of ours."""

        def apply() -> str:
            return self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                chat_template=self._pinned(self.tokenizer.get_chat_template(tools=tools)),
            )

        try:
            text = RENDERS.run(apply)
        except TooLongError:
            raise TemplateError(f"it did not end within {RENDER_SECONDS:g} s") from None
        except Exception as error:  # a template can raise anything, in any number of lines
            text = " ".join(f"{'' if isinstance(error, TemplateError) else type(error).__name__} {error}".split())
            raise TemplateError(text if len(text) <= 200 else f"{text[:197]}...") from None
        if not is_text(text):
            raise TemplateError("half of a surrogate pair is no text")
        return text

    def _pinned(self, template: str) -> str:
        """The template with DATE in place of today's date."""
        if template not in self._pinned_templates:
            self._pinned_templates[template] = _TODAY.sub(lambda call: repr(DATE.strftime(call[2])), template)
        pinned = self._pinned_templates[template]
        self._prints_date = pinned != template
        return pinned

    def _skeleton(self, messages: Messages, tools: Any, render: Render) -> Skeleton | None:
        """One per sequence of roles, unless the template also receives tools or extra keys."""
        roles = tuple(message["role"] for message in messages)
        plain = tools is None and all(len(message) == 2 for message in messages)
        if plain and roles in self._skeletons:
            return self._skeletons[roles]
        try:
            skeleton = make_skeleton(messages, render)
        except TemplateError:  # a template that requires content of a certain form
            skeleton = None
        if plain:
            self._skeletons[roles] = skeleton
        return skeleton

    def _find_marks(self) -> TurnMarks:
        added = [str(token) for token in getattr(self.tokenizer, "added_tokens_decoder", {}).values()]
        tokens = list(dict.fromkeys([*added, *self.tokenizer.all_special_tokens]))
        try:
            return find_marks(self._render, tokens)
        except TemplateError as error:
            raise ModelError(
                f"the tokenizer's chat template does not render a single user turn ({error}). Set model.chat_template."
            ) from None

    def _fold_system(self, messages: Messages) -> Messages:
        """Gemma's and Mistral's first templates reject a system turn; its text then starts the user's turn."""
        if messages[0]["role"] not in ("system", "developer") or len(messages) < 2:
            return messages
        if self._system_role is None:
            probe = [{"role": "system", "content": "x"}, {"role": "user", "content": "x"}]
            try:
                self._system_role = bool(self._render(probe, True))
            except TemplateError:
                self._system_role = False
        if self._system_role:
            return messages
        self.notes["system_folded"] += 1
        first, second = messages[0], messages[1]
        return [{**second, "content": f"{first['content']}\n\n{second['content']}"}, *messages[2:]]

    def _concatenate(self, sample: Sample) -> Spans:
        assert sample.messages is not None
        if sample.format != "prompt_completion" or [m["role"] for m in sample.messages] != ["user", "assistant"]:
            raise ModelError(
                "the tokenizer has no chat template, and these samples are conversations. Set model.chat_template "
                "to a Jinja file, or use the instruct version of the model."
            )
        prompt, completion = (message["content"] for message in sample.messages)
        return Spans(prompt + completion, [(len(prompt), len(prompt) + len(completion))], ends_with_token=False)

    def _encode_chats(self, chats: list[Spans]) -> list[Encoded]:
        # Without a template there is no beginning-of-text token in the text, so the tokenizer decides.
        habit = self._template is None
        texts = [spans.text for spans in chats]
        done = []
        for spans, (ids, ranges) in zip(chats, self._tokenise(texts, chats, habit), strict=True):
            mask = np.zeros(len(ids), np.bool_)
            for first, last in ranges:
                mask[first:last] = True
            done.append(self._close(spans, ids, mask))
        return done

    def _close(self, spans: Spans, ids: Ids, mask: npt.NDArray[np.bool_]) -> Encoded:
        """A last turn without an end token gets the tokenizer's, or the model would never learn to stop."""
        eos = self.tokenizer.eos_token_id
        at_end = bool(spans.ranges) and not spans.text[spans.ranges[-1][1] :].strip()
        if at_end and not spans.ends_with_token and eos is not None and (not len(ids) or ids[-1] != eos):
            # what follows the content (a newline) would separate the answer from its end token
            last = int(mask.nonzero()[0][-1]) + 1 if mask.any() else len(mask)
            ids, mask = np.append(ids[:last], np.uint32(eos)), np.append(mask[:last], True)
            self.notes["end_token_added"] += self._template is not None
        return Encoded(ids, mask)

    def _encode_plain(self, texts: list[Spans]) -> list[Encoded]:
        eos = self.tokenizer.eos_token_id
        done = []
        for ids, _ in self._tokenise([spans.text for spans in texts], None, True):
            if eos is not None and (not len(ids) or ids[-1] != eos):
                ids = np.append(ids, np.uint32(eos))
            done.append(Encoded(ids, np.ones(len(ids), np.bool_)))
        return done

    def _tokenise(
        self, texts: list[str], chats: list[Spans] | None, special: bool
    ) -> list[tuple[Ids, list[tuple[int, int]]]]:
        """(ids, token ranges of the spans) of each text; `special` adds the tokenizer's own special tokens."""
        if not texts:
            return []
        if self._backend is None:
            return [
                self._tokenise_slowly(text, chats[index].ranges if chats else [], special)
                for index, text in enumerate(texts)
            ]
        # Limits left in the tokenizer's file would truncate or pad silently.
        if self._backend.truncation is not None:
            self._backend.no_truncation()
        if self._backend.padding is not None:
            self._backend.no_padding()
        if chats is None or self._token_bytes is not None:
            if self._pretokens is not None:
                arrays = self._pretokens.encode(texts, add_special_tokens=special)
            else:
                encodings = self._backend.encode_batch_fast(texts, add_special_tokens=special)
                arrays = [np.array(encoding.ids, np.uint32) for encoding in encodings]
            if chats is None:
                return [(ids, []) for ids in arrays]
            return [self._placed(ids, spans, special) for ids, spans in zip(arrays, chats, strict=True)]
        encodings = self._backend.encode_batch(texts, add_special_tokens=special)
        return [_ranged(encoding, spans) for encoding, spans in zip(encodings, chats, strict=True)]

    def _placed(self, ids: Ids, spans: Spans, special: bool) -> tuple[Ids, list[tuple[int, int]]]:
        assert self._token_bytes is not None
        assert self._backend is not None
        ends = self._token_bytes.ends(ids, spans.text)
        if ends is None:
            return _ranged(self._backend.encode(spans.text, add_special_tokens=special), spans)
        return ids, [token_range(ends, spans.text, *span) for span in spans.ranges]

    def _tokenise_slowly(
        self, text: str, ranges: list[tuple[int, int]], special: bool
    ) -> tuple[Ids, list[tuple[int, int]]]:
        """For tokenizers without offsets: a boundary is where the ids of the text up to it stop matching."""
        ids = list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

        def tokens_before(character: int) -> int:
            if character >= len(text):
                return len(ids)
            prefix = self.tokenizer(text[:character], add_special_tokens=special)["input_ids"]
            agree = (a == b for a, b in zip(prefix, ids, strict=False))
            return next((index for index, same in enumerate(agree) if not same), min(len(prefix), len(ids)))

        return np.array(ids, np.uint32), [(tokens_before(start), tokens_before(end)) for start, end in ranges]


def _ranged(encoding: Any, spans: Spans) -> tuple[Ids, list[tuple[int, int]]]:
    """Ids, and the token ranges of the spans by the tokenizer's own offsets."""
    return np.array(encoding.ids, np.uint32), [_token_range(encoding, *span) for span in spans.ranges]


def _token_range(encoding: Any, start: int, end: int) -> tuple[int, int]:
    """[first, last) of the tokens that touch the characters [start, end)."""
    first, final = encoding.char_to_token(start), encoding.char_to_token(end - 1)
    if first is not None and final is not None:
        # several byte tokens can share a character: take all of them
        offsets = encoding.offsets if _shares(encoding, final) else None
        last = final + 1
        while offsets is not None and last < len(offsets) and offsets[last][0] < end and offsets[last][1] <= end:
            last += 1
        return first, last
    # a boundary character that the normaliser drops belongs to no token
    touching = [index for index, (a, b) in enumerate(encoding.offsets) if a < end and max(b, a + 1) > start]
    return (touching[0], touching[-1] + 1) if touching else (0, 0)


def _shares(encoding: Any, token: int) -> bool:
    after = encoding.token_to_chars(token + 1) if token + 1 < len(encoding) else None
    here = encoding.token_to_chars(token)
    return after is not None and here is not None and after[0] < here[1]


def encode(sample: Sample, tokenizer: Any) -> Encoded:
    """One sample; build an `Encoder` to encode many. Raises DataError, ModelError."""
    return Encoder(tokenizer).encode(sample)


def encode_prompt(messages: Messages, tokenizer: Any) -> list[int]:
    """Token ids of a conversation up to the start of the next answer, for generation."""
    return Encoder(tokenizer).encode_prompt(messages)


def tokenizer_identity(tokenizer: Any) -> dict[str, str]:
    """Digests of everything in a tokenizer that affects ids: equal digests mean equal tokenisation."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
        core = backend.to_str()
    else:
        core = json.dumps(sorted(tokenizer.get_vocab().items()))
    special = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    template = json.dumps(getattr(tokenizer, "chat_template", None), sort_keys=True)
    return {"tokenizer": _digest(f"{core}\n{special}"), "chat_template": _digest(template)}


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
