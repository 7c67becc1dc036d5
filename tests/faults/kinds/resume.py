"""Faults while a killed run resumes: it resumes from its newest commit, or says why it cannot. It never starts over."""

from dataclasses import replace

from tests.faults.kinds.kind import MEND, Kind
from tests.faults.scene import HALF
from tests.faults.shim import Rule

COMMIT = f"*/step-{HALF:08d}"


def transient(name: str, what: str, rule: Rule, **more: object) -> Kind:
    """The call works when it is tried again, so the run must try again."""
    rule = replace(rule, rank="0")
    return Kind(f"resume-{name}", what, "resume", rules=(rule,), half=True, resumes=HALF, **more)  # type: ignore[arg-type]


def permanent(name: str, what: str, *rules: Rule, words: str) -> Kind:
    """The commit cannot be read now, and is perhaps intact: the run must refuse to start."""
    return Kind(f"resume-{name}", what, "resume", (2,), words, MEND, rules=rules, half=True, resumes=HALF)


KINDS = [
    transient("read-estale", "two reads of a commit fail (ESTALE)", Rule("read", f"{COMMIT}/rank*", "ESTALE", 2)),
    transient("manifest-estale", "a manifest cannot be opened twice", Rule("open", f"{COMMIT}/manifest*", "ESTALE", 2)),
    transient("state-eio", "two reads of state.json fail", Rule("read", f"{COMMIT}/state.json", "EIO", 2)),
    transient("load-mmap", "a rank's file cannot be mapped once", Rule("mmap", f"{COMMIT}/rank*", "EIO", 1)),
    transient("list-estale", "the list of commits fails once", Rule("list", "*/checkpoints", "ESTALE", 1)),
    transient(
        "kill",
        "SIGKILL while the commit is read",
        Rule("read", f"{COMMIT}/rank*", "KILL", 1),
        words="killed by SIGKILL",
        restarts=True,
    ),
    permanent("read-eio", "no read of the newest commit works", Rule("read", f"{COMMIT}/rank*", "EIO"), words="rank-0"),
    permanent(
        "manifest-eio", "the newest manifest cannot be opened", Rule("open", f"{COMMIT}/man*", "EIO"), words="man"
    ),
    permanent("state-emfile", "state.json cannot be opened", Rule("open", f"{COMMIT}/state*", "EMFILE"), words="state"),
    permanent(
        "list-eacces", "the commits cannot be listed", Rule("list", "*/checkpoints", "EACCES"), words="checkpoints"
    ),
    permanent("list-eio", "the list of commits fails", Rule("list", "*/checkpoints", "EIO"), words="checkpoints"),
    permanent("stat-estale", "commits cannot be looked at", Rule("stat", f"{COMMIT}*", "ESTALE"), words="step-0"),
    Kind(
        "resume-metrics-enospc",
        "disk full while metrics.jsonl is cut to the commit and continued",
        "resume",
        words="metrics.jsonl",
        rules=(Rule("write", "*/metrics.jsonl*", "ENOSPC", 3),),
        half=True,
        resumes=HALF,
    ),
]
