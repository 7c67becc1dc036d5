"""Commits that somebody changed and sealed again: what a resume reads is whole, or it is refused."""

import json
import shutil
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ft_dist.checkpoint.commit import format as layout
from ft_dist.checkpoint.commit.lease import MirrorRecord
from ft_dist.checkpoint.commit.snapshot import HostBuffer
from ft_dist.checkpoint.find import newest_intact
from ft_dist.checkpoint.identity import check_identity, identity
from ft_dist.checkpoint.inspect import details, listing, verified
from ft_dist.checkpoint.load import SavedFragments
from ft_dist.checkpoint.run_record import RunRecord
from ft_dist.checkpoint.state import BaseRecord, RunState, WeightFile
from ft_dist.config.load import validate
from ft_dist.data.stream.mixture import MixtureSource
from ft_dist.data.stream.stream import DataStream
from ft_dist.errors import CheckpointError, UserError
from ft_dist.outside import parse_document
from tests.data.stores import Lengths
from tests.fuzz.bounds import outcome
from tests.fuzz.mutations import altered, damaged

CONFIG = validate({"model": {"path": "m"}, "data": {"train": ["a.jsonl"]}, "output_dir": "runs/x"})
BASE = BaseRecord(path="m", files={"model.safetensors": WeightFile(bytes=8, xxh3="0")}, digest="1", config_digest="2")
SHAPE = [6, 4]
TENSORS = {f"{kind}/w@0": torch.arange(24.0) for kind in ("master", "exp_avg", "exp_avg_sq")}


def stream():
    return DataStream([MixtureSource("a", Lengths(50))], seed=0, global_rows=2, max_length=64, packing=True, window=16)


def valid_state():
    at = stream()
    at.next_batch()
    state = RunState(
        step=3, data=at.state_dict(), loss=1.5, held_out_losses={2: 1.0}, parameters={"w": SHAPE}, run_id="a",
        world_size=1, zero_stage=0, versions={"torch": "2"}, **identity(CONFIG, base=BASE),
    )  # fmt: skip
    return json.loads(json.dumps(state.to_dict()))


STATE = valid_state()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("commits")


def write(root, *, state=None, tensors=None, names=None):
    """A commit of step 3 whose manifest fits its files, whatever they hold."""
    shutil.rmtree(root, ignore_errors=True)
    folder = layout.step_folder(root, 3)
    folder.mkdir(parents=True)
    rank = folder / layout.rank_name(0)
    HostBuffer(torch.device("cpu")).snapshot(TENSORS).write(rank)
    if tensors is not None:
        rank.write_bytes(tensors)
    (folder / layout.STATE).write_bytes(json.dumps(STATE).encode() if state is None else state)
    files = {path.name: layout.fingerprint(path) for path in sorted(folder.iterdir())}
    layout.write_manifest(folder, 3, files | (names or {}))
    return folder


def resume(root):
    """What a start does with it, without an engine."""
    commit, _ = newest_intact(root)
    state = RunState.from_dict(commit.state())
    if state.config is not None:
        check_identity(state.identity, identity(CONFIG, base=BASE), where=commit.folder)
    if state.parameters != {"w": SHAPE}:
        raise CheckpointError("other parameters")
    saved = SavedFragments(commit.fragment_files())
    whole = torch.empty(24)
    for kind in ("master", "exp_avg", "exp_avg_sq"):
        if saved.copy_into(whole, kind, "w", start=0) != 24:
            raise CheckpointError("not all of w")
    at = stream()
    if state.data is not None:
        at.load_state_dict(state.data)
    at.next_batch()
    return state


def looked_at(root):
    return listing(root), verified(root), details(root)


def test_the_valid_commit_is_resumed(root):
    write(root)
    assert outcome(lambda: resume(root)).step == 3


@given(tree=altered(STATE))
def test_states(root, tree):
    write(root, state=json.dumps(tree).encode())
    found = outcome(lambda: resume(root))
    if not isinstance(found, UserError):
        assert found.step == tree["step"]
        assert found.to_dict()["held_out_losses"] is not None
    outcome(lambda: looked_at(root))


@given(content=damaged(json.dumps(STATE).encode()))
def test_bytes_of_states(root, content):
    write(root, state=content)
    outcome(lambda: resume(root))
    outcome(lambda: looked_at(root))


def safetensors_of(header, data):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


HEADER = {
    name: {"dtype": "F32", "shape": [24], "data_offsets": [96 * at, 96 * at + 96]} for at, name in enumerate(TENSORS)
}


@given(tree=altered(HEADER), data=st.sampled_from([b"\0" * 288, b"", b"\0" * 5000]))
def test_headers_of_tensors(root, tree, data):
    write(root, tensors=safetensors_of(tree, data))
    found = outcome(lambda: resume(root))
    if tree != HEADER and not isinstance(found, UserError):
        offsets = [tree[name]["data_offsets"] for name in TENSORS]
        assert sorted(offsets) == [[0, 96], [96, 192], [192, 288]], "accepted tensors that are not there"
    outcome(lambda: looked_at(root))


@given(content=damaged(safetensors_of(HEADER, b"\0" * 288)))
def test_bytes_of_tensors(root, content):
    write(root, tensors=content)
    outcome(lambda: resume(root))


@given(content=damaged(json.dumps({"version": 1, "step": 3, "files": {}, "xxh3": "0" * 32}).encode()))
def test_bytes_of_manifests(root, content):
    folder = write(root)
    (folder / layout.MANIFEST).write_bytes(content)
    assert isinstance(outcome(lambda: resume(root)), UserError)


@given(name=st.text(max_size=300), entry=altered({"bytes": 3, "xxh3": "0" * 32}))
def test_entries_of_manifests(root, name, entry):
    write(root, names={name: entry})
    assert isinstance(outcome(lambda: resume(root)), UserError) or name in (layout.STATE, layout.rank_name(0))


@given(content=damaged(b'{"id": "0123456789abcdef", "model_commit": null}'))
def test_run_records(content):
    outcome(lambda: parse_document(content, RunRecord, where="run.json", error=CheckpointError))


@given(
    tree=altered(
        {
            "run_id": "a",
            "output_dir": "b",
            "holder": {"token": "c", "host": "d", "pid": 3, "folder": "/e"},
            "renewed": 3,
        }
    )
)
def test_mirror_records(tree):
    outcome(lambda: parse_document(json.dumps(tree), MirrorRecord, where="run.json", error=CheckpointError))
