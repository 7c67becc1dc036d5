"""Ids from cached pre-tokens equal the library's, for every split pattern of the well-known families."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from ft_dist.data.encode import pretokens
from ft_dist.data.encode.pretokens import PretokenCache

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = [
    "The thing's that the OTHER thing isn't 12345 things, the 1990s ... ",
    "naïve Ünïcode 語語 text\n\n  def f(x):",
] * 20
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def cut_by(pattern: str):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), BYTES])


def trained(pre_tokenizer, normalizer=None, around: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    names = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|im_end|>x"]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    if around:
        ids = [(name, tokenizer.token_to_id(name)) for name in names]
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    return tokenizer


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Digits(individual_digits=True)
TOKENIZERS = {
    "gpt2": trained(GPT2),
    "smollm": trained(pre_tokenizers.Sequence([DIGITS, GPT2])),
    "runs of digits": trained(pre_tokenizers.Sequence([pre_tokenizers.Digits(), GPT2])),
    "llama3": trained(cut_by(LLAMA3), around=True),
    "qwen2": trained(cut_by(QWEN2), normalizers.NFC()),
    "gpt4o": trained(cut_by(GPT4O), around=True),
}
ASCII = [
    "The",
    " thing",
    "'s",
    "'S",
    "'ll",
    " 12345",
    "x9",
    "...",
    "?!",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "\x0b",
    "\x1c",
    "/",
    "\x00",
    "user\n",
    "<s>",
    "<",
    "im",
]
BEYOND = ["'ſ", "\x85", "\u2028", "naïve", "语言", "٣٤", "Ⅷ", "½", "é", "é", "\u200d", "😀", "ǅ", "ª", "K", "İ"]
PARTS = st.sampled_from([*ASCII, *BEYOND, "\xa0", "\u3000", "<|im_start|>", "<|im_end|>", "<|im_end|>x"])
TEXT = st.one_of(
    st.lists(PARTS, max_size=12).map("".join), st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_equal_the_librarys(name: str) -> None:
    backend = TOKENIZERS[name]
    cache = PretokenCache.of(backend)
    assert cache is not None

    @given(st.lists(TEXT, max_size=5), st.booleans())
    @example(["", "the the the", ""], True)
    @example([], False)
    def check(texts: list[str], special: bool) -> None:
        theirs = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=special)]
        assert [ids.tolist() for ids in cache.encode(texts, add_special_tokens=special)] == theirs

    check()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_character_is_split_as_the_library_splits_it(name: str) -> None:
    """Each assigned or unassigned code point between letters, digits and spaces; a sixteenth of the CJK planes."""
    backend = TOKENIZERS[name]
    cache = PretokenCache.of(backend)
    assert cache is not None
    codes = [*range(0xD800), *range(0xE000, 0x30000, 1 if name == "llama3" else 7), 0xE0001, 0x10FFFF]
    codes = [code for code in codes if not 0x3400 <= code < 0xA000 or code % 16 == 0]
    step = 1 if name in ("llama3", "gpt2") else 5
    texts = [f"a{chr(code)}1 {chr(code)}'s" for code in codes[::step]]
    wrong = []
    for part in (texts[at : at + 1000] for at in range(0, len(texts), 1000)):
        theirs = backend.encode_batch_fast(part, add_special_tokens=False)
        ours = cache.encode(part, add_special_tokens=False)
        wrong += [text for text, mine, other in zip(part, ours, theirs, strict=True) if mine.tolist() != other.ids]
    assert wrong == []


def test_most_texts_do_not_fall_back_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["The thing's 12", "naïve 语言 ½\u3000😀", "<|im_start|>user\nhello<|im_end|>"]
    for name in ("gpt2", "smollm", "llama3"):
        cache = PretokenCache.of(TOKENIZERS[name])
        assert cache is not None
        monkeypatch.setattr(cache, "_backend", Refusing(cache._backend))
        cache.encode(texts, add_special_tokens=True)


class Refusing:
    def __init__(self, backend: Tokenizer) -> None:
        self.model = backend.model

    def encode_batch_fast(self, *_: object, **__: object) -> None:
        raise AssertionError("left to the library")


def test_a_full_cache_is_emptied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretokens, "LIMIT", 10)
    backend = TOKENIZERS["gpt2"]
    cache = PretokenCache.of(backend)
    assert cache is not None
    for text in ("a b c d e f g h i j k l m", "m l k", "a new thing"):
        assert cache.encode([text], add_special_tokens=False)[0].tolist() == backend.encode(text).ids
    assert len(cache) <= 13


def others() -> dict[str, Tokenizer]:
    lowering = trained(GPT2, normalizers.Lowercase())
    stripping, dropping = trained(GPT2), trained(GPT2)
    stripping.add_tokens([AddedToken("<gap>", rstrip=True, normalized=False)])
    dropping.model = models.BPE(vocab={"a": 0}, merges=[], dropout=0.1)
    return {
        "no bytes": trained(pre_tokenizers.Whitespace()),
        "no cuts": trained(BYTES),
        "a space in front": trained(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        "a class that is not known": trained(cut_by(r"\p{Han}+|\P{Han}+")),
        "an end of line": trained(cut_by(r"\s+$|\S+|\s+")),
        "removing": trained(pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), BYTES])),
        "lower case": lowering,
        "an added token that takes spaces": stripping,
        "dropout": dropping,
    }


@pytest.mark.parametrize("name", others())
def test_unknown_tokenizers_use_the_library(name: str) -> None:
    assert PretokenCache.of(others()[name]) is None
