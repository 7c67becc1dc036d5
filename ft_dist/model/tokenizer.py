"""The tokenizer of a model, with valid padding and end tokens; every correction is reported."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ft_dist.config.schema import ModelConfig
from ft_dist.errors import ModelError, counted
from ft_dist.model.anatomy.weights import reason_of
from ft_dist.model.builtin import check_hub
from ft_dist.model.quiet import quietly
from ft_dist.outside import RENDERS, TooLongError

# Reserved tokens that no text produces, best first. `<|endoftext|>` separates documents in pretraining and
# never occurs inside a chat.
_PAD_CANDIDATES = (
    "<|pad|>",
    "<pad>",
    "[PAD]",
    "<|finetune_right_pad_id|>",
    "<|PAD_TOKEN|>",
    "<|reserved_special_token_0|>",
    "<|endoftext|>",
    "<unk>",
)
_EOS_CANDIDATES = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "</s>", "<|endoftext|>", "<eos>")
_MARK = "ft-dist-mark"
LARGEST_ID = 2**24
# transformers' tags around the assistant's text; without them a template is plain Jinja
_GENERATION_MARKS = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")


def configured_tokenizer(model: ModelConfig, folder: str) -> tuple[Any, list[str]]:
    """The tokenizer of `folder` with the options of the config; see `load_tokenizer`."""
    return load_tokenizer(
        folder,
        chat_template=model.chat_template,
        new_tokens=model.new_tokens,
        trust_remote_code=model.trust_remote_code,
        revision=model.revision,
    )


def new_token_ids(model: ModelConfig, tokenizer: Any) -> list[int]:
    """The ids of `model.new_tokens`."""
    return [tokenizer.convert_tokens_to_ids(token) for token in model.new_tokens]


def load_tokenizer(
    path: str,
    *,
    chat_template: str | None = None,
    new_tokens: Iterable[str] = (),
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> tuple[Any, list[str]]:
    """The tokenizer of a folder or hub id, and notes to print: what was missing and what is used instead.

    `chat_template` is the path of a Jinja file that replaces the tokenizer's own. `new_tokens` become special tokens.
    A padding token is always set; without a better choice it is the end token, which is safe because padding is masked
    by position, never by token id.

    Raises ModelError if there is no tokenizer, the template is missing or invalid, or no end token can be found.
    """
    from transformers import AutoTokenizer

    if not Path(path).is_dir():
        check_hub(path, revision)
    try:
        with quietly():
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, revision=revision)
            tokenizer("Hello")  # some wrong values only show here
    except Exception as error:  # whatever the files hold; tokenizers raises nothing more specific
        raise ModelError(f"model.path={path}: its tokenizer does not load ({reason_of(error)}).") from None
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest > LARGEST_ID:  # embeddings and tables would get as many rows
        raise ModelError(f"model.path={path}: its tokenizer has a token with id {largest:,}, which no model can have.")
    notes: list[str] = []
    if chat_template is not None:
        tokenizer.chat_template = _read_template(chat_template)
        notes.append(f"chat template taken from {chat_template}")
    notes += _add_tokens(tokenizer, list(new_tokens))
    notes += _repair_eos(tokenizer)
    notes += _repair_pad(tokenizer)
    return tokenizer, notes


def stop_token_ids(tokenizer: Any, generation_eos: int | Sequence[int] | None = None) -> list[int]:
    """Every id that ends a generated answer: the model's, the tokenizer's, and the chat template's turn end.

    `generation_eos` is `model.generation_config.eos_token_id`. The order is stable, without duplicates.
    """
    if generation_eos is None:
        own: list[int] = []
    else:
        own = [generation_eos] if isinstance(generation_eos, int) else list(generation_eos)
    ids = [*own, tokenizer.eos_token_id, turn_end_id(tokenizer)]
    return list(dict.fromkeys(token for token in ids if token is not None))


def turn_end_id(tokenizer: Any) -> int | None:
    """The special token with which the chat template closes an assistant turn (`<|im_end|>`, `<|eot_id|>` ...).

    None without a template, or if the template ends turns with plain text.
    """
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _MARK}]
    try:
        text = RENDERS.run(lambda: tokenizer.apply_chat_template(turns, tokenize=False))
    except (Exception, TooLongError):  # a template is a program: it may require tools, a system turn ...
        return None
    tail = str(text).rpartition(_MARK)[2]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
    return next((token for token in ids if token in special), None)


def _read_template(path: str) -> str:
    from jinja2 import Environment, TemplateSyntaxError
    from jinja2.ext import loopcontrols

    try:
        text = Path(path).read_text(encoding="utf-8")
        Environment(extensions=[loopcontrols]).parse(_GENERATION_MARKS.sub("", text))  # noqa: S701 - only parsed
    except FileNotFoundError:
        raise ModelError(f"model.chat_template={path}: no such file.") from None
    except TemplateSyntaxError as error:
        raise ModelError(f"model.chat_template={path} line {error.lineno}: {error.message}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"model.chat_template={path}: cannot be read as UTF-8 text ({error}).") from None
    return text


def _add_tokens(tokenizer: Any, tokens: list[str]) -> list[str]:
    from tokenizers import AddedToken

    vocabulary = tokenizer.get_vocab()
    missing = [token for token in dict.fromkeys(tokens) if token not in vocabulary]
    if not missing:
        return []
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in missing], special_tokens=True)
    return [f"{counted(len(missing), 'new special token')}: {', '.join(missing)}"]


def _repair_eos(tokenizer: Any) -> list[str]:
    if tokenizer.eos_token_id is not None:
        return []
    vocabulary = tokenizer.get_vocab()
    turn_end = turn_end_id(tokenizer)
    candidates = [] if turn_end is None else [tokenizer.convert_ids_to_tokens(turn_end)]
    candidates += [token for token in _EOS_CANDIDATES if token in vocabulary]
    if not candidates:
        raise ModelError(
            f"model.path={tokenizer.name_or_path}: the tokenizer has no end token, and none of "
            f"{', '.join(_EOS_CANDIDATES)} is in its vocabulary. Set eos_token in tokenizer_config.json."
        )
    tokenizer.eos_token = candidates[0]
    return [f"the tokenizer has no end token; using {candidates[0]}"]


def _repair_pad(tokenizer: Any) -> list[str]:
    if tokenizer.pad_token_id is not None:
        return []
    vocabulary = tokenizer.get_vocab()
    candidates = [*_PAD_CANDIDATES, *([tokenizer.unk_token] if tokenizer.unk_token else [])]
    ends = {tokenizer.eos_token_id, turn_end_id(tokenizer)}
    pad = next((token for token in candidates if token in vocabulary and vocabulary[token] not in ends), None)
    tokenizer.pad_token = pad or tokenizer.eos_token
    why = "" if pad else " (the end token; padding is masked by position, so the model still learns to end)"
    return [f"the tokenizer has no padding token; using {tokenizer.pad_token}{why}"]
