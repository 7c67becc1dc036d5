"""Records a run on rank 0: files of the run folder, console, trackers. Other ranks record nothing."""

import faulthandler
import json
import os
import sys
from typing import IO, Any

from ft_dist.config import RunConfig, dump_config
from ft_dist.distributed import World
from ft_dist.observe.console import Console
from ft_dist.observe.files import EventLog, JsonLines, write_json
from ft_dist.observe.trackers import Tracker, open_trackers
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
        self._trackers: list[Tracker] = []
        if world.is_main:
            self._folder.root.mkdir(parents=True, exist_ok=True)
            self._folder.config.write_text(dump_config(config), encoding="utf-8")
            self._metrics = JsonLines(self._folder.metrics, keep_until=resumed_step)
            self._events = EventLog(self._folder.events)
            if config.data.log_samples:
                self._samples = JsonLines(self._folder.samples, keep_until=resumed_step)
            self._trackers = open_trackers(config, resumed_step=resumed_step)

    def event(self, name: str, **fields: Any) -> None:
        if self._events:
            self._events.event(name, **fields)

    def step(self, record: dict[str, Any], *, sample_ids: list[list[int]]) -> None:
        """Record one optimizer step; `sample_ids` has one list per row."""
        if self._metrics:
            self._metrics.write(record)
        if self._samples:
            self._samples.write({"step": record["step"], "rows": sample_ids})
        for tracker in self._trackers:
            tracker.log(record, record["step"])

    def scores(self, when: str, scores: dict[str, Any], step: int, seconds: float, *, track: bool) -> None:
        """`track`: the trackers do not have this step's scores yet."""
        self.event("evaluated", when=when, step=step, seconds=round(seconds, 3), scores=scores)
        for tracker in self._trackers if track else ():
            tracker.log({f"eval/{key}": value for key, value in scores.items() if isinstance(value, int | float)}, step)

    def earlier_scores(self, when: str) -> dict[str, Any] | None:
        """Scores that the run measured before it was resumed."""
        path = self._folder.events
        found = None
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                if f'"when": "{when}"' in line:
                    found = json.loads(line)["scores"]
        return found

    def data_report(self, content: dict[str, Any]) -> None:
        if self.world.is_main:
            write_json(self._folder.data_report, content)

    def summary(self, content: dict[str, Any]) -> None:
        if self.world.is_main:
            write_json(self._folder.summary, content)

    def close(self) -> None:
        for file in (self._metrics, self._samples, self._events):
            if file:
                file.close()
        for tracker in self._trackers:
            tracker.close()


def log_rank_output(config: RunConfig, *, rank: int) -> IO[str]:
    """Copy rank 0's output to its log file; redirect every other rank's output to its log file.

    A crash in native code writes the Python stack to the file too. Returns the open file, which must stay open.
    """
    path = RunFolder(config.run_dir).rank_log(rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a", encoding="utf-8", buffering=1)
    faulthandler.enable(file)
    if rank == 0:
        sys.stdout = _Tee(sys.stdout, file)
        sys.stderr = _Tee(sys.stderr, file)
    else:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    return file


class _Tee:
    """Writes to the console and to the rank's file."""

    def __init__(self, console: Any, file: IO[str]) -> None:
        self._console, self._file = console, file

    def write(self, text: str) -> int:
        self._file.write(text)
        return int(self._console.write(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._console, name)
