"""Where tokens end in a text, computed from the tokens alone, for byte-level BPE (Llama 3, Qwen, SmolLM, GPT-2, Phi-4).

Such a tokenizer splits the UTF-8 bytes of a text without dropping any, so cumulative token lengths give the positions.
This avoids the tokenizer's own offsets, which take a fifth of its time.
"""

import json
import unicodedata
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.uint32]
Ends = npt.NDArray[np.int64]


class TokenBytes:
    """Bytes of each token of a vocabulary."""

    def __init__(self, lengths: npt.NDArray[np.int64], *, composes: bool) -> None:
        self._lengths = lengths
        self._composes = composes

    @classmethod
    def of(cls, backend: Any) -> "TokenBytes | None":
        """For a `tokenizers.Tokenizer`; None if tokens are not bytes of the text."""
        from tokenizers.models import BPE

        normalizer = _parts(backend.normalizer, "normalizers")
        cuts = _parts(backend.pre_tokenizer, "pretokenizers")
        if not isinstance(backend.model, BPE) or not {"ByteLevel"} <= cuts or not normalizer <= {"NFC"}:
            return None
        vocabulary = backend.get_vocab(with_added_tokens=False)
        added = backend.get_added_tokens_decoder()
        lengths = np.zeros(1 + max([*vocabulary.values(), *added]), np.int64)
        for token, index in vocabulary.items():
            lengths[index] = len(token)  # one character of the byte alphabet per byte
        for index, token in added.items():
            lengths[index] = len(token.content.encode("utf-8"))
        return cls(lengths, composes="NFC" in normalizer)

    def ends(self, ids: Ids, text: str) -> Ends | None:
        """Byte at which each token ends; None if the tokens do not spell the text exactly."""
        if self._composes and not unicodedata.is_normalized("NFC", text):
            return None
        ends = np.cumsum(self._lengths[ids])
        whole = len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
        return ends if len(ends) and ends[-1] == whole else None


def token_range(ends: Ends, text: str, start: int, end: int) -> tuple[int, int]:
    """[first, last) of the tokens that touch the characters [start, end), start < end."""
    if not text.isascii():
        start, end = (len(text[:at].encode("utf-8", "surrogatepass")) for at in (start, end))
    first, last = np.searchsorted(ends, (start, end - 1), side="right").tolist()
    return first, last + 1


def _parts(component: Any, several: str) -> set[str]:
    """Type names of a normaliser or pre-tokenizer, including the members of a sequence."""
    if component is None:
        return set()
    state = json.loads(component.__getstate__())
    return {part["type"] for part in state.get(several, [state])}
