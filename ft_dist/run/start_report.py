"""What a run says when it starts or resumes."""

from typing import TYPE_CHECKING, Any

from ft_dist.data.stream.batch import BatchStream
from ft_dist.data.stream.stream import DataStream
from ft_dist.resources import versions
from ft_dist.run.length import length_notes

if TYPE_CHECKING:
    from ft_dist.run.run import Run


def report_start(run: "Run", *, facts: list[str], data_report: dict[str, Any]) -> None:
    """Write the data report, the events and the first lines on the console."""
    run.recorder.data_report(data_report)
    console = run.recorder.console
    for line in (*dict.fromkeys([*facts, *run.engine.notes]), run.engine.kernels):
        console.say(line)
    for line in run.checkpoints.skipped:
        console.note(f"checkpoint skipped: {line}")
    trainable = sum(getattr(p, "ds_numel", p.numel()) for _, p in run.engine.trainable())
    console.say(
        f"training {trainable / 1e6:,.2f} M parameters ({run.config.method.kind}, ZeRO {run.engine.stage}, "
        f"{run.config.model.dtype}) for {run.length} on {run.world.size} x {run.world.device.type}"
    )
    name = "resume" if run.step else "start"
    run.recorder.event(name, step=run.step, world_size=run.world.size, versions=versions())
    if run.step:
        console.say(f"resumed from step {run.step}")
    early = run.evaluations.out_of_patience
    if early:
        why = run.evaluations.why_stopped()
        console.note(f"the run has already stopped, at step {run.step}: {why}. Raise evaluate.patience to go on")
    finished = run.finished and not early
    for line in length_notes(run.config.optim, run.length, step=run.step, finished=finished):
        console.note(line)
    if run.data_changes:
        for change in run.data_changes:
            console.note(f"data.train has changed: {change}; a new epoch begins")
        run.recorder.event("data_changed", step=run.step, changes=run.data_changes, sources=_sources(run.stream))
    if run.checkpoints.changed:
        run.recorder.event("config_changed", step=run.step, changes=run.checkpoints.changed)
        for line in run.checkpoints.changed:
            console.note(f"changed since the checkpoint: {line}")


def _sources(stream: BatchStream) -> list[dict[str, Any]]:
    """The range of sample ids of each source."""
    assert isinstance(stream, DataStream), "only a mixture changes"
    starts = stream.store.starts.tolist()
    return [
        {"path": source.name, "first_id": first, "samples": len(source.store), "weight": source.weight}
        for source, first in zip(stream.mixture.sources, starts[:-1], strict=True)
    ]
