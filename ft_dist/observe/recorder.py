"""Records a run on rank 0: files of the run folder, console, trackers. Other ranks record nothing.

Nothing here ends a run: what cannot be written now waits (`patient`), and the user reads once that it does.
"""

import faulthandler
import os
from typing import Any

from ft_dist.config import RunConfig, dump_config
from ft_dist.distributed import World
from ft_dist.errors import StorageError
from ft_dist.observe.console import Console
from ft_dist.observe.files import EventLog, JsonLines, json_text, records, write_json
from ft_dist.observe.patient import AppendedFile, PatientFile, ReplacedFile
from ft_dist.observe.streams import copy_streams
from ft_dist.observe.trackers import Feed, open_trackers
from ft_dist.run_folder import RunFolder


class Recorder:
    """Open for the whole of training. Methods do nothing on ranks other than 0."""

    def __init__(self, config: RunConfig, world: World, *, resumed_step: int) -> None:
        self.config = config
        self.world = world
        self._folder = RunFolder(config.run_dir)
        self.console = Console(enabled=world.is_main)
        self._metrics: JsonLines | None = None
        self._samples: JsonLines | None = None
        self._events: EventLog | None = None
        self._files: list[PatientFile] = []
        self._feeds: list[Feed] = []
        if world.is_main:
            self._replace(self._folder.config, dump_config(config))
            self._metrics = JsonLines(self._folder.metrics, keep_until=resumed_step)
            self._events = EventLog(self._folder.events)
            self._files += [self._metrics, self._events]
            if config.data.log_samples:
                self._samples = JsonLines(self._folder.samples, keep_until=resumed_step)
                self._files.append(self._samples)
            self._feeds = open_trackers(config, resumed_step=resumed_step, note=self.console.note)

    def watch(self, file: PatientFile) -> None:
        """Report the outages of `file` too, and close it."""
        self._files.append(file)

    def event(self, name: str, **fields: Any) -> None:
        if self._events:
            self._events.event(name, **fields)
            self._report_outages()

    def step(self, record: dict[str, Any], *, sample_ids: list[list[int]]) -> None:
        """Record one optimizer step; `sample_ids` has one list per row."""
        if self._metrics:
            self._metrics.write(record)
        if self._samples:
            self._samples.write({"step": record["step"], "rows": sample_ids})
        for feed in self._feeds:
            feed.log(record, record["step"])
        self._report_outages()

    def scores(self, when: str, scores: dict[str, Any], step: int, seconds: float, *, track: bool) -> None:
        """`track`: the trackers do not have this step's scores yet."""
        self.event("evaluated", when=when, step=step, seconds=round(seconds, 3), scores=scores)
        for feed in self._feeds if track else ():
            feed.log({f"eval/{key}": value for key, value in scores.items() if isinstance(value, int | float)}, step)

    def earlier_scores(self, when: str) -> dict[str, Any] | None:
        """Scores that the run measured before it was resumed."""
        found = None
        try:
            for record in records(self._folder.events):
                if record.get("when") == when and isinstance(record.get("scores"), dict):
                    found = record["scores"]
        except FileNotFoundError:
            return None
        except OSError as error:
            self.console.note(
                f"{self._folder.events}: cannot be read ({error.strerror}), so earlier scores are missing"
            )
        return found

    def data_report(self, content: dict[str, Any]) -> None:
        if self.world.is_main:
            self._replace(self._folder.data_report, json_text(content))

    def summary(self, content: dict[str, Any]) -> None:
        """Raises StorageError: the file says that the run has finished."""
        if not self.world.is_main:
            return
        try:
            write_json(self._folder.summary, content)
        except OSError as error:
            raise StorageError(
                f"{self._folder.summary}: cannot be written ({error.strerror}). {self._folder.final} is complete: fix "
                "the cause and run the same command again, which writes both."
            ) from None

    def close(self, *, wait_s: float) -> None:
        """Trackers get `wait_s` seconds for what they have not sent."""
        for feed in self._feeds:
            feed.close(wait_s=wait_s)
        self._report_outages()
        for file in self._files:
            lost = file.close()
            for line in filter(None, [*map(str, file.outages()), lost]):
                self.console.note(line)

    def _replace(self, path: Any, text: str) -> None:
        file = ReplacedFile(path)
        file.write_text(text)
        self._files.append(file)

    def _report_outages(self) -> None:
        for file in self._files:
            for outage in file.outages():
                self.console.note(str(outage))
                if self._events and outage.over:
                    self._events.event(
                        "log_delayed",
                        file=outage.file.name,
                        reason=outage.reason,
                        lines=outage.waited,
                        dropped=outage.dropped,
                        seconds=round(outage.seconds, 3),
                    )
            if isinstance(file, JsonLines):
                while file.notes:
                    self.console.note(file.notes.pop())


def log_rank_output(config: RunConfig, *, rank: int) -> AppendedFile:
    """Copy rank 0's output to its log file; redirect every other rank's output to its log file.

    A crash in native code writes the Python stack to the file too. The returned file must stay open.
    """
    file = AppendedFile(RunFolder(config.run_dir).rank_log(rank), lines=False)
    descriptor = file.open()
    # a duplicate: the file is closed and opened again when it fails
    faulthandler.enable(2 if descriptor is None else os.dup(descriptor))
    if rank > 0 and descriptor is not None:
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
    copy_streams(file, only=rank > 0)
    return file
