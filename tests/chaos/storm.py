"""Kills runs at random instants until they finish: `python -m tests.chaos.storm [--kills N] [--seed S]`.

An episode trains a tiny model for STEPS steps. Each of its lives draws a layout (ranks, ZeRO stage), an instant and a
victim (one rank, all of them, the launcher) from the seed and ends by SIGKILL; the same command starts the next life.
Every other episode keeps its layout and must then repeat the uninterrupted run bit for bit.

An instant is an event in the run folder plus a random delay: usually a commit started but not sealed, else a completed
step or the start of the process. What a kill hits differs between machines; the result must not.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ft_dist.launcher.elastic.restarts import newest_commit
from tests.conftest import read_lines, start_cli

STEPS = 24
SETTINGS = [
    "smoke",
    "model.dtype=fp32",
    "data.eval=[]",
    "data.log_samples=true",
    "batch.global_rows=6",
    f"optim.max_steps={STEPS}",
    "checkpoint.interval_steps=2",
]
LIFE_S = 600
TOLERANCE = 1e-6
"""Relative tolerance of an fp32 loss on another layout, which sums in another order"""


class LostWorkError(AssertionError):
    """Work was lost, repeated wrongly, or needed manual help; the message holds the seed."""


@dataclass(frozen=True)
class Layout:
    ranks: int
    stage: int


@dataclass(frozen=True)
class Blow:
    """SIGKILL for `victim` (rank, all, launcher), `delay_s` after the `count`-th `moment` (save, step, start)."""

    victim: str
    rank: int
    moment: str
    count: int
    delay_s: float


def draw_layout(rng: random.Random) -> Layout:
    return Layout(rng.choices((1, 2, 3, 4), (4, 3, 2, 1))[0], rng.randrange(4))


def draw_blow(rng: random.Random) -> Blow:
    moment = rng.choices(("save", "step", "start"), (7, 2, 1))[0]
    # a commit of this model takes about 30 ms, a start some seconds
    delay_s = {"save": rng.uniform(0, 0.025), "step": rng.uniform(0, 0.2), "start": rng.uniform(0, 10)}[moment]
    victim = rng.choices(("rank", "all", "launcher"), (6, 2, 2))[0]
    return Blow(victim, rng.randrange(4), moment, rng.randint(1, 4), delay_s)


class Storm:
    """Run episodes in `folder` until `kills` kills have happened; `hits` counts what they hit."""

    def __init__(self, *, kills: int, seed: int, folder: Path) -> None:
        self.kills, self.seed, self.folder = kills, seed, folder
        self.struck = 0
        self.hits: Counter[str] = Counter()
        self._rng = random.Random(seed)
        self._undisturbed: dict[tuple[str, Layout], Path] = {}

    def run(self) -> None:
        """Raises LostWorkError."""
        episode = 0
        while self.struck < self.kills:
            kind, keeps = ("lora", "full")[episode % 2], (episode + episode // 2) % 2 == 0
            fixed = Layout(self._rng.randint(1, 2), self._rng.randrange(4)) if keeps else None
            self._episode(self.folder / f"episode-{episode}", kind, fixed, until=self.struck + -(-self.kills // 2))
            episode += 1

    def _episode(self, folder: Path, kind: str, fixed: Layout | None, *, until: int) -> None:
        code = None
        while code != 0:
            layout = fixed or draw_layout(self._rng)
            blow = draw_blow(self._rng) if self.struck < min(until, self.kills) else None
            code = self._life(folder, kind, layout, blow)
        exact = fixed is not None
        self._compare(folder, self._reference(kind, fixed or Layout(1, 0)), exact=exact, what=f"{kind} {fixed}")

    def _life(self, folder: Path, kind: str, layout: Layout, blow: Blow | None) -> int:
        """Start the run, kill it as drawn, wait for the end; returns the exit code."""
        committed, starts = newest_commit(folder), starts_of(folder)
        settings = [f"method.kind={kind}", f"engine.zero_stage={layout.stage}", f"output_dir={folder}"]
        process = start_cli("train", *SETTINGS, *settings, "--nproc", str(layout.ranks), "--max-restarts", "0")
        try:
            struck = bool(blow) and moment_comes(process, folder, blow) and self._strike(process, folder, blow)
            out, err = process.communicate(timeout=LIFE_S)
        except subprocess.TimeoutExpired:
            raise self._broken(f"{layout} did not end in {LIFE_S} s after {blow}") from None
        finally:
            process.kill()
            process.wait()
        if process.returncode != 0 and not struck:
            raise self._broken(f"no process was killed, but {layout} ended with {process.returncode}: {out}{err}")
        later = starts_of(folder)
        if len(later) > len(starts) and later[-1] < committed:
            raise self._broken(f"step {committed} was committed, but {layout} began after step {later[-1]}")
        if newest_commit(folder) < committed:
            raise self._broken(
                f"step {committed} was committed, but now only step {newest_commit(folder)} is, after {blow}"
            )
        return process.returncode

    def _strike(self, process: "subprocess.Popen[str]", folder: Path, blow: Blow) -> bool:
        workers = workers_of(process.pid)
        victims = {"all": workers, "rank": workers[blow.rank % max(1, len(workers)) :][:1]}.get(blow.victim, [])
        in_commit = open_commits(folder / "checkpoints", since=time.time() - 1)
        for pid in victims or [process.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.struck += 1
        self.hits["in a commit" if in_commit else "elsewhere"] += 1
        self.hits[blow.victim] += 1
        print(f"kill {self.struck}/{self.kills}: {blow}; committed: step {newest_commit(folder)}", flush=True)
        return True

    def _reference(self, kind: str, layout: Layout) -> Path:
        """The folder of an uninterrupted run."""
        if (kind, layout) not in self._undisturbed:
            folder = self.folder / f"undisturbed-{kind}-{layout.ranks}-{layout.stage}"
            self._life(folder, kind, layout, None)
            self._undisturbed[kind, layout] = folder
        return self._undisturbed[kind, layout]

    def _compare(self, folder: Path, reference: Path, *, exact: bool, what: str) -> None:
        if (folder / "samples.jsonl").read_text() != (reference / "samples.jsonl").read_text():
            raise self._broken(f"{what}: {folder / 'samples.jsonl'} is not that of the undisturbed run")
        ours, theirs = ([line["loss"] for line in read_lines(path / "metrics.jsonl")] for path in (folder, reference))
        if len(ours) != STEPS or len(theirs) != STEPS:
            raise self._broken(f"{what}: {len(ours)} and {len(theirs)} steps are recorded, not {STEPS}")
        worst = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
        if worst > (0 if exact else TOLERANCE):
            raise self._broken(f"{what}: a loss is off by {worst:.2e} (relative)")
        print(f"{what}: {STEPS} steps as undisturbed, the samples the same, losses within {worst:.1e}", flush=True)

    def _broken(self, message: str) -> LostWorkError:
        return LostWorkError(f"seed {self.seed}, kill {self.struck}: {message}")


def moment_comes(process: "subprocess.Popen[str]", folder: Path, blow: Blow) -> bool:
    """Wait for the instant of the kill; False if the process ends first."""
    metrics, root = folder / "metrics.jsonl", folder / "checkpoints"
    began = time.time()
    if blow.moment == "start":
        deadline = time.monotonic() + blow.delay_s
        while time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.005)
        return process.poll() is None
    seen, known = 0, set[Path]()
    lives = len(starts_of(folder))
    while seen < blow.count:
        if process.poll() is not None:
            return False
        if blow.moment == "save":
            known |= set(open_commits(root, since=began))
            seen = len(known)
        elif len(starts_of(folder)) > lives:
            seen = len(metrics.read_text().splitlines()) - newest_start(folder)
        time.sleep(0.0005)
    time.sleep(blow.delay_s)
    return process.poll() is None


def open_commits(root: Path, *, since: float) -> list[Path]:
    """Commits started after `since` (Unix seconds) and not sealed yet."""
    found = []
    for step in root.glob("step-*"):
        with suppress(FileNotFoundError):
            if step.stat().st_mtime >= since and not (step / "manifest.json").exists():
                found.append(step)
    return found


def starts_of(folder: Path) -> list[int]:
    """The first step of each life so far."""
    path = folder / "events.jsonl"
    events = read_lines(path) if path.exists() else []
    return [event["step"] for event in events if event["event"] in ("start", "resume")]


def newest_start(folder: Path) -> int:
    return starts_of(folder)[-1]


def workers_of(pid: int, *, module: str = "ft_dist.train") -> list[int]:
    """Process ids of an agent's ranks, in rank order."""
    workers = []
    with suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            if module in Path(f"/proc/{child}/cmdline").read_text():
                workers.append(int(child))
    return workers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=None, help="drawn and printed if not given")
    arguments = parser.parse_args()
    seed = random.SystemRandom().randrange(2**32) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        storm = Storm(kills=arguments.kills, seed=seed, folder=Path(folder))
        storm.run()
    hits = ", ".join(f"{count} {what}" for what, count in storm.hits.items())
    print(f"{storm.struck} kills ({hits}): no commit lost, every sample once, every loss as undisturbed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
