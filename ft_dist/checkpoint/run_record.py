"""Which run a folder, its commits and its mirror belong to: an id, drawn when the run first starts.

`output_dir/run.json` holds it, every commit repeats it in its state, and `run.json` in `checkpoint.path` names the run
that the copies are of. So a commit of one run is never resumed, replaced or deleted by another.
"""

from contextlib import suppress
from pathlib import Path

from ft_dist.checkpoint.commit.format import commits, write_synced
from ft_dist.checkpoint.commit.lease import RENEW_S, Lease, Say, new_run_id
from ft_dist.checkpoint.state import RunState
from ft_dist.config import RunConfig
from ft_dist.errors import CheckpointError, ConfigError, StorageError
from ft_dist.outside import Document, parse_document
from ft_dist.run_folder import RunFolder
from ft_dist.storage import Storage, open_storage
from ft_dist.storage.retry import patiently


class RunRecord(Document):
    """`output_dir/run.json`."""

    id: str
    model_path: str | None = None
    model_commit: str | None = None
    """Of a hub model: the commit that the run began with, which later starts load too"""


def read_record(folder: RunFolder) -> RunRecord | None:
    """None if no run has started in the folder. Raises ConfigError for a record that is not readable."""
    try:
        text = patiently(folder.run_record.read_bytes)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ConfigError(f"{folder.run_record}: cannot be read ({error.strerror}). Run again when it can.") from None
    return parse_document(text, RunRecord, where=folder.run_record, error=ConfigError)


def write_record(folder: RunFolder, record: RunRecord) -> None:
    """Raises ConfigError if the disk does not take it."""
    if read_record(folder) == record:
        return
    try:
        folder.root.mkdir(parents=True, exist_ok=True)
        write_synced(folder.run_record, record.model_dump_json(indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"{folder.run_record}: cannot be written ({error.strerror}). Mend that first.") from None


def run_id_of(folder: RunFolder) -> str | None:
    """The id in run.json, else in the newest commit that has one; None for a new folder and for older versions."""
    record = read_record(folder)
    if record is not None:
        return record.id
    for commit in reversed(commits(folder.checkpoints)):
        with suppress(CheckpointError):
            state = RunState.from_dict(commit.state())
            if state.run_id is not None:
                return state.run_id
    return None


def claim(config: RunConfig, storage: Storage | None, *, say: Say) -> tuple[str, Lease | None]:
    """The id of the run in output_dir, and the lease of `storage` for it. Rank 0 calls it, with the folder locked.

    A store that does not answer is claimed with the first copy, if output_dir has commits to resume from. Raises
    ConfigError if the store belongs to another run or is in use, StorageError.
    """
    folder = RunFolder(config.run_dir)
    run_id = run_id_of(folder)
    if storage is None:
        return run_id or new_run_id(), None
    hasty = open_storage(storage.url, wait_s=RENEW_S)
    lease = Lease(storage, run_id=run_id, output_dir=config.output_dir, hasty=hasty)
    try:
        lease.take(say=say)
    except StorageError as error:
        if not commits(folder.checkpoints):
            raise
        say(f"note: {error} The run resumes from {folder.checkpoints}.")
        lease.run_id = run_id or new_run_id()
    assert lease.run_id
    return lease.run_id, lease


def pin_model(config: RunConfig) -> None:
    """Without model.revision, load the commit of a hub model that this run began with. Raises ConfigError."""
    if config.model.revision is not None or Path(config.model.path).exists():
        return
    record = read_record(RunFolder(config.run_dir))
    if record and record.model_path == config.model.path:
        config.model.revision = record.model_commit
