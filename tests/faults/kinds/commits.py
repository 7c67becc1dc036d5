"""Faults while a run saves: they cost a checkpoint at most, and the run continues. Kills lose no earlier commit."""

from tests.faults.kinds.kind import MEND, Kind
from tests.faults.shim import Rule

RANK_FILE = "saving-*"
NOT_SAVED = "was not saved"


def of_commit(name: str, what: str, *rules: Rule, words: str = NOT_SAVED, **more: object) -> Kind:
    return Kind(f"commit-{name}", what, "commit", words=words, rules=rules, **more)  # type: ignore[arg-type]


def killed(name: str, what: str, rule: Rule, **more: object) -> Kind:
    """The rank is killed inside a commit; the agent restarts it."""
    words = "killed by SIGKILL.*resumes from the commit of step"
    return Kind(f"kill-{name}", what, "commit", words=words, rules=(rule,), restarts=True, **more)  # type: ignore[arg-type]


KINDS = [
    of_commit("write-enospc", "disk full in one save", Rule("write", "*/rank-00000.safetensors*", "ENOSPC", 1)),
    of_commit(
        "write-eio-always",
        "every write to the ranks' files fails (EIO)",
        Rule("write", "*/rank-00000.safetensors*", "EIO"),
        may_lack=("checkpoints",),
    ),
    of_commit("write-short", "writes are cut short", Rule("write", "*/rank-00000.safetensors*", "SHORT"), words=""),
    of_commit("write-edquot-state", "quota exceeded at state.json", Rule("write", "*/state.json*", "EDQUOT", 1)),
    of_commit("fsync-eio", "fsync of a rank's file fails", Rule("fsync", "*/rank-00000.safetensors*", "EIO", 1)),
    of_commit("fsync-manifest-eio", "fsync of a manifest fails", Rule("fsync", "*/manifest.json*", "EIO", 1)),
    of_commit("rename-estale", "the rename that publishes fails", Rule("rename", "*/step-????????", "ESTALE", 1)),
    of_commit("open-emfile", "no file descriptor left at state.json", Rule("create", "*/state.json*", "EMFILE", 1)),
    of_commit("mkdir-erofs", "no folder can be created for a save", Rule("mkdir", ".saving-", "EROFS", 1)),
    of_commit("no-space-reported", "the disk says that 0 bytes are free", Rule("free", "/run/", "0", 4)),
    of_commit(
        "one-rank-enospc",
        "one rank of two cannot write",
        Rule("write", "*/rank-00001.safetensors*", "ENOSPC", 1),
        ranks=2,
    ),
    of_commit(
        "slow-fsync", "fsync takes 3 s", Rule("fsync", "*/rank-00000.safetensors*", "SLOW=3000", 2), words="waited"
    ),
    of_commit(
        "retention-eio",
        "old commits cannot be deleted",
        Rule("unlink", "*/step-????????.removing/*", "EIO", rank="0"),
        words="",
    ),
    killed(
        "before-manifest",
        "SIGKILL before the manifest is written",
        Rule("create", "*/manifest.json*", "KILL", 1, skip=2),
    ),
    killed(
        "after-rename",
        "SIGKILL between rename and sync of the folder",
        Rule("fsync", "*/checkpoints", "KILL", 1, skip=2),
    ),
    killed(
        "in-retention",
        "SIGKILL while an old commit is deleted",
        Rule("unlink", "*/step-????????.removing/*", "KILL", 1, skip=1, rank="0"),
    ),
    killed(
        "one-rank-in-save",
        "SIGKILL of one rank of two that writes its file",
        Rule("write", "*/rank-00001.safetensors*", "KILL", 1, skip=2),
        ranks=2,
    ),
    Kind(
        "kill-in-final",
        "SIGKILL while final/ is written",
        "final",
        words="killed by SIGKILL",
        restarts=True,
        rules=(Rule("create", "*/run/.final-partial-*", "KILL", 1, skip=1),),
    ),
    Kind(
        "kill-in-summary",
        "SIGKILL while summary.json is written",
        "final",
        words="killed by SIGKILL",
        restarts=True,
        rules=(Rule("rename", "*/summary.json", "KILL", 1),),
    ),
    Kind(
        "final-write-enospc",
        "disk full at final/",
        "final",
        codes=(2,),
        words="final.*cannot be written.*commit of step 12 is safe",
        then="make room, then run the same command again",
        rules=(Rule("write", "*/run/.final-partial-*", "ENOSPC"),),
    ),
    Kind(
        "final-rename-eio",
        "final/ cannot be renamed into place",
        "final",
        codes=(2,),
        words="final.*cannot be written.*commit of step 12 is safe",
        then=MEND,
        rules=(Rule("rename", "*/run/final", "EIO"),),
    ),
    Kind(
        "final-fsync-eio",
        "final/ cannot be synced",
        "final",
        codes=(2,),
        words="final.*cannot be written.*commit of step 12 is safe",
        then=MEND,
        rules=(Rule("fsync", "*/run/.final-partial-*", "EIO"),),
    ),
    Kind(
        "summary-write-enospc",
        "disk full at summary.json",
        "final",
        codes=(2,),
        words="summary.json.*(No space|cannot be written)",
        then="make room, then run the same command again",
        rules=(Rule("write", "*/summary.json*", "ENOSPC"),),
    ),
]
