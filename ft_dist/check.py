"""Every check that can run before training, in seconds, before a GPU is allocated.

`check` needs no torch: the data's files and formats, the model folder, batch and world size, what a resume would find,
and whether the output folder is writable. `check_method` builds the model without weights, and `check_data` loads the
tokenizer and encodes the first records. None of them leaves files behind.
"""

import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft_dist.checkpoint.commit.format import MANIFEST, STATE, Commit, commits, named_commit, remains, verify
from ft_dist.checkpoint.commit.lease import Lease
from ft_dist.checkpoint.find import newest_readable, restarted
from ft_dist.checkpoint.identity import base_model, check_identity, identity
from ft_dist.checkpoint.run_record import pin_model, run_id_of
from ft_dist.checkpoint.state import RunState
from ft_dist.config import RunConfig
from ft_dist.config.schema import OptimConfig, SourceConfig
from ft_dist.data.read.check import REMOTE_SECONDS, check_sources
from ft_dist.errors import CheckpointError, CheckpointVersionError, ConfigError, StorageError, counted
from ft_dist.model.builtin import check_hub, local_folder, resolve_model
from ft_dist.model.facts import model_facts
from ft_dist.outside import expand_home
from ft_dist.run_folder import RunFolder
from ft_dist.storage import is_remote_folder, open_storage

if TYPE_CHECKING:
    from ft_dist.data.prepare.preview import Preview


def check(config: RunConfig, *, world_size: int) -> list[str]:
    """Raise the first UserError found; otherwise return one line per fact.

    Sets model.revision to the commit of the hub that a run in output_dir began with.
    """
    pin_model(config)
    facts = [_check_batch(config, world_size), _check_output(config.run_dir)]
    _check_warmup(config.optim)
    if config.method.unused:
        names = ", ".join(f"method.{name}" for name in config.method.unused)
        facts.append(f"not used with method.kind={config.method.kind}: {names}")
    facts += check_sources(config.data)
    folder = local_folder(resolve_model(config.model.path), config.model.revision)
    facts += _check_model(config, folder)
    _check_evaluation(config)
    _check_mirror(config)
    _check_resume(config)
    _check_resumed(config, folder)
    return facts


def check_method(config: RunConfig) -> list[str]:
    """One line per thing that the options of `method` leave out; call it after `check`.

    The layers are those of the model that transformers builds from config.json: the weight files may have other names.
    Raises ModelError for options that do not fit them, or if transformers cannot build the model.
    """
    from ft_dist.model.quiet import quiet_process

    quiet_process()
    from ft_dist.model.load import outline
    from ft_dist.model.parts.layers import layers_of

    return config.method.check(layers_of(outline(config.model, folder=resolve_model(config.model.path))))


def check_data(config: RunConfig) -> tuple[list[str], list["Preview"]]:
    """What a run does with the first records of its data, with the same code; call it after `check`.

    Returns lines for the console, and a preview of every source. Raises ModelError if the tokenizer or chat template
    does not load, DataError if it rejects a record.
    """
    from ft_dist.model.quiet import quiet_process

    quiet_process()
    from ft_dist.data.prepare.preview import preview_data
    from ft_dist.model.tokenizer import configured_tokenizer

    tokenizer, facts = configured_tokenizer(config.model, resolve_model(config.model.path))
    if config.data.live:
        _check_live_position(config, config.data.live, tokenizer)
    previews = preview_data(config, tokenizer)
    for one in previews:
        facts += one.lines(config.data, model_path=config.model.path)
    return facts, previews


def check_mirror(config: RunConfig) -> list[str]:
    """Look into checkpoint.path, as the start of a run does; call it after `check`.

    Raises ConfigError if it holds another run, and StorageError if it does not answer, unless output_dir has commits.
    """
    if not config.checkpoint.path:
        return []
    folder = RunFolder(config.run_dir)
    storage = open_storage(config.checkpoint.path, wait_s=REMOTE_SECONDS, limit=None)
    lease = Lease(storage, run_id=run_id_of(folder), output_dir=config.output_dir)
    try:
        found = lease.check()
    except StorageError as error:
        if not commits(folder.checkpoints):
            raise
        return [f"note: {error} A run resumes from {folder.checkpoints}."]
    return [f"checkpoint.path: {'holds copies of this run' if found else 'is empty'}"]


def _check_batch(config: RunConfig, world_size: int) -> str:
    rows = config.batch.global_rows
    if rows < world_size:
        raise ConfigError(
            f"batch.global_rows={rows} is less than the world size {world_size}: some ranks would never get a row. "
            f"Use at least {world_size}, or fewer processes."
        )
    rows_a_rank = -(-rows // world_size)
    accumulation = -(-rows_a_rank // config.batch.micro_rows)
    return (
        f"batch: {counted(rows, 'row')} per step over {counted(world_size, 'rank')}, "
        f"{accumulation} micro-batch{'es' if accumulation > 1 else ''} of up to {config.batch.micro_rows} each"
    )


def _check_warmup(optim: OptimConfig) -> None:
    """With epochs, the length is known once the data are prepared: see `length_notes`."""
    if optim.max_steps is not None and optim.warmup_steps > optim.max_steps:
        raise ConfigError(
            f"optim.warmup_steps={optim.warmup_steps} is more than optim.max_steps={optim.max_steps}: the run would "
            f"end before it reaches optim.lr. Use at most {optim.max_steps}."
        )


def _check_output(run_dir: Path) -> str:
    existing = run_dir
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise ConfigError(f"output_dir={run_dir}: {existing} is a file, not a folder. Choose another output_dir.")
    try:
        # permission bits do not reflect root, quotas or read-only file systems, so try
        Path(tempfile.mkdtemp(prefix=".ft_dist-", dir=existing)).rmdir()
    except OSError as error:
        raise ConfigError(
            f"output_dir={run_dir}: cannot write in {existing} ({error.strerror}). Choose another output_dir."
        ) from None
    return f"output: {run_dir}{'' if run_dir.exists() else ' (new)'}"


def _check_model(config: RunConfig, folder: str) -> list[str]:
    if not Path(folder).is_dir():
        check_hub(folder, config.model.revision)
        return [f"model: {folder} from the hub; its weights are not on this machine yet"]
    facts = model_facts(folder)
    if facts.max_positions and config.data.max_length > facts.max_positions:
        raise ConfigError(
            f"data.max_length={config.data.max_length} is more than the model's {facts.max_positions} positions. "
            f"Use at most {facts.max_positions}."
        )
    lines = [f"model: {facts.architecture}, {facts.total_parameters / 1e6:,.1f} M parameters, stored in {facts.dtype}"]
    if facts.other_parts:
        parts = ", ".join(f"{name} ({size / 1e6:,.1f} M parameters)" for name, size in facts.other_parts.items())
        lines.append(f"only the text model is trained, not {parts}")
    return lines


def _check_evaluation(config: RunConfig) -> None:
    if config.evaluate.generate and not config.data.eval:
        raise ConfigError(
            "evaluate.generate=true needs data.eval. Name a held-out file, or set evaluate.generate=false."
        )
    patience = config.evaluate.patience
    wanting = [
        ("optim.load_best=true", config.optim.load_best),
        (f"evaluate.patience={patience}", patience is not None),
    ]
    lacking = [("data.eval", config.data.eval), ("evaluate.interval_steps > 0", config.evaluate.interval_steps)]
    missing = " and ".join(name for name, given in lacking if not given)
    for key, wanted in wanting:
        if wanted and missing:
            raise ConfigError(
                f"{key} needs held-out losses during training. Set {missing}, or remove {key.partition('=')[0]}."
            )


def _check_mirror(config: RunConfig) -> None:
    """Copies in the run's own folder would replace what they copy, and retention there would delete it."""
    place = config.checkpoint.path
    if not place:
        return
    if is_remote_folder(place):
        open_storage(place)
        return
    own = Path(os.path.realpath(config.run_dir))
    mirror = Path(os.path.realpath(expand_home(place.removeprefix("file://"), error=ConfigError)))
    for inner, outer in ((mirror, own), (own, mirror)):
        if any(_same_folder(outer, folder) for folder in (inner, *inner.parents)):
            raise ConfigError(
                f"checkpoint.path={place}: is {'in' if inner is mirror else 'a folder around'} "
                f"output_dir={config.run_dir}. Copies belong elsewhere, best on another disk: name a folder or URL "
                "outside it, or remove checkpoint.path."
            )


def _same_folder(one: Path, other: Path) -> bool:
    """Also if two mounts show the same folder."""
    with suppress(OSError):
        return one == other or one.samefile(other)
    return False


def _check_resume(config: RunConfig) -> None:
    resume = config.checkpoint.resume
    root = RunFolder(config.run_dir).checkpoints
    if resume == "never" and remains(root) and not restarted():
        raise ConfigError(
            f"checkpoint.resume=never, but {root} holds commits of an earlier run. "
            "Use checkpoint.resume=auto to continue it, or another output_dir."
        )
    if resume in ("auto", "never") or remains(root) or config.checkpoint.path:  # the run may be in the mirror
        return
    folder = Path(resume)
    if not (folder / MANIFEST).is_file():
        inside = [*commits(folder), *commits(RunFolder(folder).checkpoints)]
        fix = f"Name {inside[-1].folder}" if inside else "Name the folder of one, such as step-00000100"
        raise ConfigError(
            f"checkpoint.resume={resume}: no {MANIFEST} there, so it is not a complete checkpoint. {fix}, or set "
            "checkpoint.resume=auto."
        )
    named_commit(folder)


def _check_resumed(config: RunConfig, folder: str) -> None:
    """Refuse what a resume would: a config, base weights or an order of the data that the commit does not allow.

    Only commits on this machine are read, and tensors are not.
    """
    found = _resumed_state(config)
    if found is None:
        return
    commit, state = found
    if state.config is not None:
        now = identity(config, base=base_model(config, folder, whole=False))
        check_identity(state.identity, now, where=commit.folder)
    if state.data is not None and not config.data.live:
        from ft_dist.data.stream.stream import check_order, order_rules

        data = config.data
        check_order(
            state.data,
            *(
                order_rules(
                    seed=config.seed,
                    max_length=data.max_length,
                    packing=packing,
                    curriculum=data.curriculum,
                    shuffle_samples=data.shuffle_samples,
                )
                for packing in _possible_packing(config)
            ),
        )


def _check_live_position(config: RunConfig, source: SourceConfig, tokenizer: Any) -> None:
    """The same for the position in a live source, which belongs to a tokenizer."""
    from ft_dist.data.stream.live import check_live, live_rules

    found = _resumed_state(config)
    if found is not None and found[1].data is not None:
        rules = [
            live_rules(source, tokenizer, data=config.data, seed=config.seed, packing=packing)
            for packing in _possible_packing(config)
        ]
        check_live(found[1].data, source, *rules)


def _possible_packing(config: RunConfig) -> list[bool]:
    """With data.packing=auto, the run's self-check decides."""
    return [True, False] if config.data.packing == "auto" else [config.data.packing is True]


def _resumed_state(config: RunConfig) -> tuple[Commit, RunState] | None:
    """The commit that a run here would resume from, unless a newer one is in checkpoint.path, and its state."""
    resume = config.checkpoint.resume
    root = RunFolder(config.run_dir).checkpoints
    if resume == "never" and not restarted():
        return None
    if resume in ("auto", "never") or remains(root):
        try:
            commit = newest_readable(root)
        except CheckpointVersionError:
            raise
        except CheckpointError:
            if not config.checkpoint.path:
                raise
            return None  # the mirror may have it intact
    elif config.checkpoint.path and not Path(resume).is_dir():
        return None
    else:
        commit = named_commit(Path(resume))
        verify(commit, state_only=True)
    return (commit, RunState.from_dict(commit.state(), where=commit.folder / STATE)) if commit else None
