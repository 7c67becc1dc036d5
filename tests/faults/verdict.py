"""Plays a kind of fault and judges it: what was lost, and whether the run behaved as its entry says."""

import json
import re
import shutil
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.kinds.kind import Kind
from tests.faults.planted import commits
from tests.faults.prepared import Prepared
from tests.faults.scene import STEPS, Life, Scene, damaged_files

LEFTOVERS = re.compile(r"^\.|\.partial|\.saving-|\.replaced|\.fetching|\.tmp|~$")
OPEN: list[Scene] = []
"""Scenes that are being played, so that an interrupt can close them"""
ENDING_S = 10.0
"""After its command has ended, the processes of a run are gone within this time"""

LOST, HUNG, CODE, TRACEBACK, WORDS, LEFT = "lost work", "hung", "exit code", "traceback", "message", "left behind"
BROKEN = "the fault did not happen"
SEVERITY = (LOST, HUNG, CODE, TRACEBACK, WORDS, LEFT, BROKEN)


@dataclass
class Verdict:
    """`problems` are pairs of a severity and what happened; none: the kind holds."""

    name: str
    codes: list[int | None] = field(default_factory=list)
    """Of each start of the command"""
    began: list[int] = field(default_factory=list)
    """The step after which each process of rank 0 began"""
    said: str = ""
    """The line of the hit run that has the expected words"""
    problems: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def holds(self) -> bool:
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def judge(kind: Kind, prepared: Prepared, folder: Path, *, keep: bool = False) -> Verdict:
    """Play `kind` in `folder`, which is deleted afterwards unless `keep`."""
    started = time.monotonic()
    verdict = Verdict(kind.name)
    reference = prepared.whole(kind.ranks)
    scene = prepared.scene(folder, ranks=kind.ranks, half=kind.half)
    scene.settings += kind.settings
    OPEN.append(scene)
    try:
        _play(kind, scene, reference, verdict)
    except Exception as error:  # the story could not be played, which is a finding too
        where = traceback.extract_tb(error.__traceback__)[-1]
        verdict.problems.append((BROKEN, f"{type(error).__name__} at {where.name}:{where.lineno}: {error}"[:1500]))
    finally:
        scene.close()
        OPEN.remove(scene)
    verdict.problems = [(kind_of, text.replace(str(folder), "")) for kind_of, text in verdict.problems]
    verdict.said = verdict.said.replace(str(folder) + "/", "")
    verdict.problems.sort(key=lambda problem: SEVERITY.index(problem[0]))
    verdict.seconds = round(time.monotonic() - started, 1)
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)
    return verdict


def _play(kind: Kind, scene: Scene, reference: Scene, verdict: Verdict) -> None:
    found = verdict.problems
    last = life = kind.play(scene)
    verdict.codes = [one.code for one in scene.lives]
    _check_life(kind, scene, life, verdict)
    if life.code != 0:
        before = scene.newest
        life.shim.disarm()
        if kind.mend:
            kind.mend(scene)
        last = again = scene.play()
        verdict.codes.append(again.code)
        if again.hung:
            found.append((HUNG, f"the next start did not end: {_end_of(again)}"))
        elif again.code != 0:
            found.append((LOST, f"the next start ended with {again.code}: {_end_of(again)}"))
        if scene.newest < before:
            found.append((LOST, f"step {before} was committed, but then only step {scene.newest}"))
    found += _wrong_starts(kind, scene, verdict)
    if last.code == 0:
        found += _differences(kind, scene, reference)
    found += [(LEFT, f"{name} is left behind") for name in _leftovers(kind, scene)]


def _check_life(kind: Kind, scene: Scene, life: Life, verdict: Verdict) -> None:
    """The life that was hit: it ended as the entry says, and all commits are intact."""
    found = verdict.problems
    if life.hung:
        found.append((HUNG, f"the run did not end: {_end_of(life)}"))
    elif life.code not in kind.codes:
        found.append((CODE, f"exit code {life.code} instead of {_codes(kind)}: {_end_of(life)}"))
    restarted = re.search(r"restart \d+ of", life.said)
    if restarted and not kind.restarts:
        found.append((CODE, f"the run failed and was restarted: {_end_of(life, restarted.start())}"))
    if (at := life.said.find("Traceback (most recent call last)")) >= 0:
        end = life.said.find("\nft-dist", at)
        found.append((TRACEBACK, _end_of(life, end if end >= 0 else None)))
    match = re.search(kind.words, life.said, re.IGNORECASE)
    if not match:
        found.append((WORDS, f"no /{kind.words}/ in: {_end_of(life)}"))
    elif kind.words:
        start, end = life.said.rfind("\n", 0, match.start()) + 1, life.said.find("\n", match.end())
        verdict.said = life.said[start : end if end >= 0 else None].strip()
    for number, hits in enumerate(life.shim.hits()):
        if hits == 0:
            found.append((BROKEN, f"no call matched {life.shim.rules[number]}"))
    newest = max(life.commits, default=0)
    if kind.resumes is None and scene.newest < newest:
        found.append((LOST, f"step {newest} was committed, but then only step {scene.newest}"))
    for step in commits(scene.root):
        wrong = damaged_files(scene.root / f"step-{step:08d}")
        # what the fault itself damaged stays until the run has resumed
        if wrong and not (kind.leaves and life.code == 2):
            found.append((LOST, f"a commit is damaged: {', '.join(wrong)}"))
    deadline = time.monotonic() + ENDING_S
    while scene.processes() and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in scene.processes():
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()[:200]
        found.append((LEFT, f"process {pid} still runs: {command}"))
    scene.kill_all()


def _wrong_starts(kind: Kind, scene: Scene, verdict: Verdict) -> list[tuple[str, str]]:
    """Every process of rank 0 must begin after the newest commit that it found."""
    found = []
    newest: dict[int, int] = {}
    begun: set[int] = set()
    for line in scene.trace():
        if line["rank"] != 0:
            continue
        pid = line["pid"]
        if "commits" in line:
            newest[pid] = max(line["commits"], default=0)
        elif pid not in begun:
            begun.add(pid)
            began = line["step"] - 1
            expected = newest[pid] if kind.resumes is None or verdict.began else kind.resumes
            verdict.began.append(began)
            if began != expected:
                found.append((LOST, f"a process began after step {began}; the commit of step {expected} was there"))
    return found


def _differences(kind: Kind, scene: Scene, reference: Scene) -> list[tuple[str, str]]:
    """The finished run against the undisturbed one."""
    found = []
    for name, what in (("metrics.jsonl", "loss"), ("samples.jsonl", "rows")):
        ours, theirs = (_by_step(run / name, what) for run in (scene.run, reference.run))
        found += [(LOST, f"{name}: {line}") for line in _compare(ours, theirs, partial=name in kind.may_lack)]
    for name in ("adapter_model.safetensors",):
        ours, theirs = scene.run / "final" / name, reference.run / "final" / name
        if not ours.exists():
            found.append((LOST, f"there is no final/{name}"))
        elif ours.read_bytes() != theirs.read_bytes():
            found.append((LOST, f"final/{name} is not that of the undisturbed run"))
    if "summary.json" not in kind.may_lack:
        path = scene.run / "summary.json"
        steps = json.loads(path.read_text()).get("steps") if path.exists() else None
        if steps != STEPS:
            found.append((LOST, f"summary.json says that {steps} steps were trained"))
    for name in ("events.jsonl",):
        if name not in kind.may_lack:
            found += [(LOST, f"{name}: {line}") for line in _torn(scene.run / name)]
    newest = scene.newest
    if newest != STEPS and "checkpoints" not in kind.may_lack:
        found.append((LOST, f"the newest commit is of step {newest}"))
    return found


def _by_step(path: Path, what: str) -> list[tuple[int, Any]]:
    """(step, value) of each line; (-1, line) for one that cannot be read."""
    rows: list[tuple[int, Any]] = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
            rows.append((record["step"], record[what]))
        except (ValueError, KeyError, TypeError):
            rows.append((-1, line[:60]))
    return rows


def _compare(ours: list[tuple[int, Any]], theirs: list[tuple[int, Any]], *, partial: bool) -> list[str]:
    steps = [step for step, _ in ours if step >= 0]
    expected = dict(theirs)
    found = [f"torn line {line!r}" for step, line in ours if step < 0 and not partial]
    if len(set(steps)) != len(steps):
        found.append(f"steps are there more than once: {steps}")
    if not partial and set(steps) != set(expected):
        found.append(f"has steps {steps}, not {sorted(expected)}")
    wrong = [step for step, value in ours if step >= 0 and value != expected.get(step)]
    if wrong:
        found.append(f"steps {wrong} differ from the undisturbed run")
    return found


def _torn(path: Path) -> list[str]:
    found = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines() if path.exists() else [], 1):
        try:
            json.loads(line)["event"]
        except (ValueError, KeyError, TypeError):
            found.append(f"line {number} is torn: {line[:60]!r}")
    return found


def _leftovers(kind: Kind, scene: Scene) -> list[str]:
    places = [*scene.run.rglob("*"), *(scene.folder / "tmp").rglob("*")]
    found = []
    for path in places:
        name = str(path.relative_to(scene.folder))
        temporary = path.is_relative_to(scene.folder / "tmp") and "torchinductor" not in name
        allowed = kind.leaves and re.search(kind.leaves, name)
        if (temporary or LEFTOVERS.search(path.name)) and not allowed:
            found.append(name)
    return found


def _codes(kind: Kind) -> str:
    return " or ".join(map(str, kind.codes))


def _end_of(life: Life, at: int | None = None) -> str:
    """The last lines that the run printed, or the last before a position."""
    whole = life.said if at is None else life.said[: life.said.find("\n", at)]
    lines = [line for line in whole.splitlines() if line.strip()]
    return " | ".join(lines[-3:])[-600:]
