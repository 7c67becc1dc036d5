"""Faults while a run starts: one line with exit code 2, nothing half-written, and the same command works later."""

from tests.faults.kinds.kind import AGAIN, MEND, NOTHING, Kind
from tests.faults.scene import Life, Scene
from tests.faults.shim import Rule


def at_start(name: str, what: str, *rules: Rule, words: str, **more: object) -> Kind:
    options = {"codes": (2,), "then": MEND} | more
    return Kind(f"start-{name}", what, "start", words=words, rules=rules, **options)  # type: ignore[arg-type]


def without_tokens(scene: Scene) -> None:
    import shutil

    shutil.rmtree(scene.cache / "data")


def on_new_tokens(*rules: Rule):  # type: ignore[no-untyped-def]
    def story(scene: Scene) -> Life:
        without_tokens(scene)
        return scene.play(rules=rules)

    return story


def tokens(name: str, what: str, *rules: Rule, words: str = "cache", **more: object) -> Kind:
    options = {"codes": (2,), "then": MEND} | more
    return Kind(f"tokens-{name}", what, "start", words=words, story=on_new_tokens(*rules), **options)  # type: ignore[arg-type]


KINDS = [
    at_start(
        "config-enospc",
        "disk full at config.yaml",
        Rule("write", "*/config.yaml*", "ENOSPC"),
        words="config.yaml",
        codes=(0,),
        then=NOTHING,
        may_lack=("config.yaml",),
    ),
    at_start("lock-erofs", "run.lock is on a read-only disk", Rule("create", "*/run.lock", "EROFS"), words="run.lock"),
    at_start("mkdir-enospc", "output_dir cannot be created", Rule("mkdir", "*/run", "ENOSPC"), words="output_dir"),
    at_start("data-eio", "the data file cannot be read", Rule("read", "*/train.jsonl", "EIO"), words="train.jsonl"),
    at_start(
        "weights-eio",
        "the base model's weights cannot be read",
        Rule("open", "*/model.safetensors", "EIO"),
        words="model.safetensors",
    ),
    at_start(
        "weights-mmap",
        "the base model's weights cannot be mapped",
        Rule("mmap", "*/model.safetensors", "ENOMEM"),
        words="model.safetensors|memory",
    ),
    tokens("enospc", "disk full at the token cache", Rule("write", "*/cache/data/*", "ENOSPC")),
    tokens("rename-eio", "the token cache cannot be renamed into place", Rule("rename", "*/cache/data/*", "EIO")),
    tokens("read-eio", "the token cache cannot be mapped", Rule("mmap", "*/cache/data/*", "EIO"), then=AGAIN),
]
