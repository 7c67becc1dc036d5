"""Every side gets the same rows, in the same order, with the same labels."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from benchmarks.peers import litgpt, ours, rows
from benchmarks.peers.case import Case
from benchmarks.peers.compare import _dealt, make_work, peer_of
from benchmarks.peers.environments import NAMES
from benchmarks.peers.torchtune.parts import ChatTokenizer
from ft_dist.data.prepare.build import prepare
from ft_dist.model.tokenizer import load_tokenizer

LINES = ["text,category", *(f'"Where is parcel {n}, please?",answer_{n}' for n in range(13))]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, rows.Counts]:
    folder = tmp_path_factory.mktemp("work")
    (folder / "train.csv").write_text("\n".join(LINES) + "\n")
    blank = Case(Path(), Path(), "lora", "fp32", steps=4, rows=3, max_length=256, learning_rate=1e-4)
    return make_work(blank, model="tiny-llama", data=folder / "train.csv", folder=folder)


def test_a_csv_becomes_the_chats_that_every_side_reads(work: tuple[Case, rows.Counts]) -> None:
    case, _ = work
    mine = rows.read_chats(case.ordered.with_name("chats.jsonl"))
    theirs = rows.read_chats(case.ordered)
    assert len(mine) == 12
    assert mine[0]["messages"][1:] == [
        {"role": "user", "content": "Where is parcel 0, please?"},
        {"role": "assistant", "content": "answer_0"},
    ]
    assert mine != theirs, "our stream shuffles"
    assert sorted(mine, key=json.dumps) == sorted(theirs, key=json.dumps)


def test_the_peers_order_is_our_streams_order(work: tuple[Case, rows.Counts], tmp_path: Path) -> None:
    case, counts = work
    chats = case.ordered.with_name("chats.jsonl")
    config = ours.config(case, tmp_path, chats=chats)
    tokenizer, _ = load_tokenizer(str(case.model))
    store = prepare(config.data.train, tokenizer, data=config.data, model_path=str(case.model)).store
    lengths = store.lengths_of(torch.arange(12).numpy())
    unordered = rows.read_chats(chats)
    places = [unordered.index(row) for row in rows.read_chats(case.ordered)]
    steps = [sum(lengths[place] for place in places[at : at + 3]) for at in range(0, 12, 3)]
    assert steps == counts.real


def test_a_loader_that_shuffles_gives_the_same_order(work: tuple[Case, rows.Counts]) -> None:
    case, _ = work
    written = rows.read_chats(_dealt(litgpt.PEER, case))
    generator = torch.Generator().manual_seed(litgpt.DATA_SEED)
    loader: Any = DataLoader(written, batch_size=3, shuffle=True, generator=generator, collate_fn=list)
    dealt = [row for batch in loader for row in batch]
    assert written != dealt
    assert dealt == rows.read_chats(case.ordered)


def test_every_template_gives_our_tokens_and_labels(work: tuple[Case, rows.Counts], tmp_path: Path) -> None:
    case, _ = work
    chats = rows.read_chats(case.ordered.with_name("chats.jsonl"))
    tokenizer, _ = load_tokenizer(str(case.model))
    config = ours.config(case, tmp_path, chats=case.ordered.with_name("chats.jsonl"))
    store = prepare(config.data.train, tokenizer, data=config.data, model_path=str(case.model)).store
    tuned = ChatTokenizer(str(case.model / "tokenizer.json"), 256)
    for number, row in enumerate(chats):
        tokens, labelled, _ = (part.tolist() for part in store.gather(torch.tensor([number]).numpy()))
        marked = tokenizer.apply_chat_template(
            row["messages"],
            chat_template=rows.TEMPLATE.read_text(),
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        assert marked["input_ids"] == tokens, "TRL"
        assert [bool(one) for one in marked["assistant_masks"]] == labelled, "TRL"
        made = tuned({"messages": [_Message(turn) for turn in row["messages"]]})
        assert made == {"tokens": tokens, "mask": [not one for one in labelled]}, "torchtune"
        given = litgpt.sample(row["messages"])
        # its style "smollm2", given a system prompt
        text = (
            f"<|im_start|>system\n{given['sys_prompt']}<|im_end|>\n"
            f"<|im_start|>user\n{given['instruction']}<|im_end|>\n<|im_start|>assistant\n"
        )
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        answer = tokenizer(given["output"], add_special_tokens=False)["input_ids"]
        assert [*prompt, *answer, tokenizer.eos_token_id] == tokens, "LitGPT"
        assert [False] * len(prompt) + [True] * (len(answer) + 1) == labelled, "LitGPT"


class _Message:
    """As torchtune's own: role and text_content."""

    def __init__(self, turn: dict[str, str]) -> None:
        self.role, self.text_content = turn["role"], turn["content"]


def test_too_few_rows_are_reported() -> None:
    with pytest.raises(SystemExit, match="20 rows are needed"):
        rows.spread([{}] * 13, 20)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_every_peer_gets_the_file_the_batch_and_the_learning_rate(
    name: str, method: str, work: tuple[Case, rows.Counts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(**{**vars(work[0]), "method": method})
    # only LitGPT itself can convert a checkpoint
    monkeypatch.setattr(litgpt, "converted", lambda case, binaries: case.model)
    command = peer_of(name).command(case, tmp_path, Path("/environment/bin"))
    text = " ".join(command.arguments) + "".join(
        file.read_text() for file in tmp_path.rglob("*") if file.is_file() and not file.is_symlink()
    )
    assert command.arguments[0].startswith("/environment/bin/")
    assert "0.0001" in text
    assert str(case.ordered) in text or (tmp_path / "data").is_dir()
    assert ("lora" in text.replace(str(tmp_path), "")) == (method == "lora")
