"""A conversation in the terminal: streamed, remembered, interruptible."""

import io
from pathlib import Path

import pytest

from ft_dist.evaluate.answers import answer_prompts
from ft_dist.model.tiny import make_tiny
from ft_dist.result.chat import Conversation, chat
from ft_dist.result.load import Finished, load_finished


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_tiny("tiny-llama", path)
    return path


@pytest.fixture(scope="module")
def finished(folder: Path) -> Finished:
    return load_finished(str(folder), device="cpu")


def test_one_prompt_prints_one_answer(folder: Path, finished: Finished, capsys) -> None:
    chat(str(folder), prompt="Hello", system="Be brief.", max_new_tokens=8)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    ids = finished.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    [expected] = answer_prompts(
        finished.model, [ids], tokenizer=finished.tokenizer, max_new_tokens=8, batch_rows=1, device="cpu"
    )
    assert capsys.readouterr().out == f"{expected}\n"


def test_turns_are_remembered_and_exit_ends_the_chat(folder: Path, capsys, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(Conversation, "answer", lambda self, text, write: asked.append(text))
    monkeypatch.setattr("sys.stdin", io.StringIO("first\n\nsecond\nexit\nnever\n"))
    chat(str(folder))
    assert asked == ["first", "second"]


def test_the_conversation_grows(finished: Finished) -> None:
    talk = Conversation(finished, max_new_tokens=4)
    pieces: list[str] = []
    answer = talk.answer("one", pieces.append)
    assert "".join(pieces).strip() == answer
    talk.answer("two", pieces.append)
    assert [turn["role"] for turn in talk.messages] == ["user", "assistant"] * 2
    assert talk.messages[1]["content"] == answer


def test_ctrl_c_ends_the_answer_only(finished: Finished) -> None:
    talk = Conversation(finished, max_new_tokens=3000)

    def interrupt(piece: str) -> None:
        raise KeyboardInterrupt

    talk.answer("never stop", interrupt)
    assert talk.messages[-1]["role"] == "assistant"


def test_an_error_while_generating_is_raised_not_waited_for(finished: Finished, monkeypatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Conversation, "_generate", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        Conversation(finished).answer("hello", lambda piece: None)


def test_old_turns_are_dropped_when_positions_run_out(finished: Finished) -> None:
    talk = Conversation(finished, system="Be brief.", max_new_tokens=2)
    for number in range(3):
        talk.messages += [{"role": "user", "content": f"{number}" * 1800}, {"role": "assistant", "content": "ok"}]
    talk.answer("last", lambda piece: None)
    kept = [turn["content"][:4] for turn in talk.messages]
    assert kept[0] == "Be b"
    assert kept[1] == "1111"
