"""Token positions derived from their bytes equal the tokenizer's offsets."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers

from ft_dist.data.encode.token_bytes import TokenBytes, token_range

ALPHABET = pre_tokenizers.ByteLevel.alphabet()
TEXTS = ["the thing is that the other thing", "naïve Ünïcode 語語 😀😀 text", "a\n\nb\n \n c  d\t"] * 20


def trained(**parts):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=ALPHABET, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", special=True, normalized=False), "é語"])
    return tokenizer


BACKEND = trained()
pieces = st.lists(
    st.sampled_from(["the ", "thing", "語", "😀", "ï", "<|im_end|>", "é語", "\n", "  ", "e\u0301"]), min_size=1
)


@given(pieces, st.data())
def test_ranges_equal_the_offsets(parts, data):
    text = "".join(parts)
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    encoding = BACKEND.encode(text, add_special_tokens=False)
    ids = np.array(encoding.ids, np.uint32)
    ends = TokenBytes.of(BACKEND).ends(ids, text)
    touching = [index for index, (a, b) in enumerate(encoding.offsets) if a < end and b > start]
    assert token_range(ends, text, start, end) == (touching[0], touching[-1] + 1)


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": normalizers.Lowercase()},
        {"pre_tokenizer": pre_tokenizers.Metaspace()},
        {"pre_tokenizer": pre_tokenizers.Whitespace()},
    ],
)
def test_tokens_that_differ_from_the_texts_bytes_use_offsets(parts):
    assert TokenBytes.of(trained(**parts)) is None


def test_a_text_that_decodes_differently_uses_offsets():
    composing = trained(normalizer=normalizers.NFC())
    spaced = trained(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True))
    for backend, text in ((composing, "cafe\u0301 the"), (spaced, "the thing")):
        ids = np.array(backend.encode(text, add_special_tokens=False).ids, np.uint32)
        assert TokenBytes.of(backend).ends(ids, text) is None
    ids = np.array(composing.encode("café the", add_special_tokens=False).ids, np.uint32)
    assert TokenBytes.of(composing).ends(ids, "café the")[-1] == len("café the".encode())
