"""Padding and end tokens: added where missing, unchanged where present, and every change is reported."""

from pathlib import Path

import pytest

from ft_dist.errors import ModelError
from ft_dist.model.tiny import byte_tokenizer
from ft_dist.model.tokenizer import load_tokenizer, stop_token_ids, turn_end_id


def saved(folder: Path, **changes: object) -> str:
    tokenizer = byte_tokenizer()
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_complete_tokenizer_is_not_changed(tmp_path: Path) -> None:
    tokenizer, notes = load_tokenizer(saved(tmp_path))
    assert notes == []
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|pad|>", "<|im_end|>")


def test_missing_padding_uses_a_reserved_token_that_ends_nothing(tmp_path: Path) -> None:
    tokenizer, notes = load_tokenizer(saved(tmp_path, pad_token=None))
    assert tokenizer.pad_token == "<|pad|>"
    assert notes == ["the tokenizer has no padding token; using <|pad|>"]


def test_missing_padding_falls_back_to_the_end_token_with_a_report(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("ft_dist.model.tokenizer._PAD_CANDIDATES", ())
    tokenizer, notes = load_tokenizer(saved(tmp_path, pad_token=None))
    assert tokenizer.pad_token == tokenizer.eos_token
    assert "masked by position" in notes[0]


def test_missing_end_token_is_taken_from_the_template(tmp_path: Path) -> None:
    tokenizer, notes = load_tokenizer(saved(tmp_path, eos_token=None))
    assert tokenizer.eos_token == "<|im_end|>"
    assert notes == ["the tokenizer has no end token; using <|im_end|>"]


def test_answers_stop_at_the_turn_end_even_if_eos_is_another_token(tmp_path: Path) -> None:
    tokenizer, notes = load_tokenizer(saved(tmp_path, eos_token="<|endoftext|>"))
    turn_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert notes == []
    assert turn_end_id(tokenizer) == turn_end
    assert stop_token_ids(tokenizer, 7) == [7, tokenizer.eos_token_id, turn_end]
    assert stop_token_ids(tokenizer, [tokenizer.eos_token_id]) == [tokenizer.eos_token_id, turn_end]
    assert stop_token_ids(tokenizer) == [tokenizer.eos_token_id, turn_end]


def test_no_turn_end_without_template(tmp_path: Path) -> None:
    tokenizer, _ = load_tokenizer(saved(tmp_path, chat_template=None))
    assert turn_end_id(tokenizer) is None


def test_new_tokens_become_single_ids_once(tmp_path: Path) -> None:
    before = len(byte_tokenizer())
    tokenizer, notes = load_tokenizer(saved(tmp_path), new_tokens=["<tool>", "<tool>", "<|pad|>"])
    assert len(tokenizer) == before + 1
    assert tokenizer("<tool>").input_ids == [before]
    assert notes == ["1 new special token: <tool>"]


def test_template_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    folder = saved(tmp_path / "t")
    path.write_text("{% if %}")
    with pytest.raises(ModelError, match=r"mine.jinja line 1: "):
        load_tokenizer(folder, chat_template=str(path))
    path.write_text(
        "{% for m in messages %}{%- generation %}{{ m.content }}<|endoftext|>{% endgeneration -%}{% endfor %}"
    )
    tokenizer, notes = load_tokenizer(folder, chat_template=str(path))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a<|endoftext|>"
    assert turn_end_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert notes == [f"chat template taken from {path}"]
    with pytest.raises(ModelError, match="no such file"):
        load_tokenizer(folder, chat_template=str(tmp_path / "absent.jinja"))


def test_a_folder_without_tokenizer_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match="its tokenizer does not load") as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, old, new, why",
    [
        ("tokenizer.json", '"merges": []', '"merges": [7]', "did not match any variant"),
        ("tokenizer.json", "{", "[", "Expecting"),
        ("tokenizer_config.json", '"pad_token"', '"model_max_length": {}, "pad_token"', "not supported between"),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path: Path, name: str, old: str, new: str, why: str) -> None:
    """tokenizers raises bare Exceptions, and some values only show when text is tokenised."""
    file = Path(saved(tmp_path)) / name
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(ModelError, match=rf"its tokenizer does not load \(.*{why}") as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)
