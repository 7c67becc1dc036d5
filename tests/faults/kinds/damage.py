"""Damage found at a resume, in commits, records and prepared data."""

import json
import shutil
from collections.abc import Callable

from tests.faults.kinds.kind import MEND, Kind
from tests.faults.scene import HALF, INTERVAL, Life, Scene

NEWEST, OLDER = f"step-{HALF:08d}", f"step-{HALF - INTERVAL:08d}"
RANK_FILE = "rank-00000.safetensors"
Damage = Callable[[Scene], None]


def flip(scene: Scene, name: str) -> None:
    path = scene.folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(scene: Scene, name: str) -> None:
    path = scene.folder / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def after(*damages: Damage) -> Callable[[Scene], Life]:
    """The story: damage, then start."""

    def story(scene: Scene) -> Life:
        for damage in damages:
            damage(scene)
        return scene.play()

    return story


def in_commit(what: Callable[[Scene, str], None], step: str, name: str = RANK_FILE) -> Damage:
    return lambda scene: what(scene, f"run/checkpoints/{step}/{name}")


def newer_version(scene: Scene) -> None:
    """As a later version of ft_dist would write it: its checksum holds."""
    import xxhash

    for step in (OLDER, NEWEST):
        path = scene.root / step / "manifest.json"
        manifest = json.loads(path.read_text()) | {"version": 99}
        del manifest["xxh3"]
        own = xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())
        path.write_text(json.dumps(manifest | {"xxh3": own}))


def older_version(scene: Scene) -> None:
    """Mends `newer_version`: the right ft_dist is used again."""
    import xxhash

    for step in (OLDER, NEWEST):
        path = scene.root / step / "manifest.json"
        manifest = json.loads(path.read_text()) | {"version": 1}
        del manifest["xxh3"]
        own = xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())
        path.write_text(json.dumps(manifest | {"xxh3": own}))


def cut_publish(scene: Scene) -> None:
    """What SIGKILL leaves between the two renames of a step that is saved again."""
    newest = scene.root / NEWEST
    newest.rename(newest.with_name(f"{NEWEST}.replaced"))


def cut_publish_with_both(scene: Scene) -> None:
    """The same, with the new save complete but not yet in place."""
    newest = scene.root / NEWEST
    shutil.copytree(newest, newest.with_name(f"{NEWEST}.saving-0123abcd"))
    cut_publish(scene)


def append(name: str, content: bytes) -> Damage:
    def damage(scene: Scene) -> None:
        with (scene.run / name).open("ab") as file:
            file.write(content)

    return damage


def back_up(scene: Scene) -> None:
    shutil.copytree(scene.root, scene.folder / "backup")


def restore(scene: Scene) -> None:
    shutil.rmtree(scene.root)
    shutil.copytree(scene.folder / "backup", scene.root)


def flip_tokens(scene: Scene) -> None:
    """In the tokens of the prepared training set."""
    from safetensors import safe_open

    (path,) = scene.cache.glob("data/*/tokens-00000.safetensors")
    with safe_open(path, framework="np") as file:
        tokens = file.get_tensor("tokens")
    content = path.read_bytes()
    at = content.index(tokens.tobytes())
    damaged = bytearray(content)
    for place in range(at, at + tokens.nbytes, 64):
        damaged[place] ^= 1
    path.write_bytes(damaged)


def forget_tokens(scene: Scene) -> None:
    shutil.rmtree(scene.cache / "data")


def newest_damaged(name: str, what: str, *damages: Damage, words: str = "checkpoint skipped", **more: object) -> Kind:
    """The run says so and resumes from the commit before it."""
    options = {"resumes": HALF - INTERVAL, "leaves": r"\.damaged"} | more
    return Kind(f"damaged-{name}", what, "resume", words=words, half=True, story=after(*damages), **options)  # type: ignore[arg-type]


KINDS = [
    newest_damaged("bit", "a flipped bit in the newest commit", in_commit(flip, NEWEST)),
    newest_damaged("truncated", "a truncated file in the newest commit", in_commit(truncate, NEWEST)),
    newest_damaged(
        "missing",
        "a missing file in the newest commit",
        in_commit(lambda scene, name: (scene.folder / name).unlink(), NEWEST),
    ),
    newest_damaged("state", "a torn state.json", in_commit(truncate, NEWEST, "state.json")),
    newest_damaged("manifest", "a torn manifest", in_commit(truncate, NEWEST, "manifest.json")),
    newest_damaged(
        "all",
        "every commit has a flipped bit",
        back_up,
        in_commit(flip, NEWEST),
        in_commit(flip, OLDER),
        words=r"step-0000000\d",
        codes=(2,),
        then=MEND,
        mend=restore,
        resumes=HALF,
    ),
    newest_damaged(
        "version",
        "commits of a later format version",
        newer_version,
        words="version 99",
        codes=(2,),
        then=MEND,
        mend=older_version,
        resumes=HALF,
    ),
    newest_damaged(
        "cut-publish", "a kill between the renames of a step saved again", cut_publish, words="", resumes=HALF
    ),
    newest_damaged(
        "cut-publish-saved",
        "the same, with the new save complete",
        cut_publish_with_both,
        words="",
        resumes=HALF,
    ),
    newest_damaged(
        "metrics",
        "a torn, a foreign and a cut line in metrics.jsonl",
        append("metrics.jsonl", b'[1, 2]\n"\xe2\x82\n{"step": 99, "loss'),
        words="",
        resumes=HALF,
    ),
    newest_damaged(
        "events",
        "a torn, a foreign and a cut line in events.jsonl",
        append("events.jsonl", b'[1, 2]\n"when": "before"\xe2\x82\n{"time": 1, "when": "before", "ev'),
        words="",
        resumes=HALF,
        settings=("data.eval=[emails/test.jsonl]", "evaluate.max_samples=4"),
        may_lack=("events.jsonl",),
    ),
    newest_damaged(
        "config-yaml",
        "half of config.yaml",
        lambda scene: truncate(scene, "run/config.yaml"),
        words="",
        resumes=HALF,
    ),
    Kind(
        "damaged-tokens",
        "flipped tokens in the prepared set",
        "training",
        (2,),
        "checksum",
        "delete the set that the message names, then run the same command again",
        story=after(flip_tokens),
        mend=forget_tokens,
    ),
    Kind(
        "damaged-token-index",
        "half of the prepared set's index",
        "start",
        (0,),
        story=after(
            lambda scene: truncate(scene, str(next(scene.cache.glob("data/*/index.json")).relative_to(scene.folder)))
        ),
    ),
    Kind(
        "damaged-weights",
        "the base model's weights are truncated",
        "resume",
        (2,),
        "model.safetensors|weights",
        MEND,
        half=True,
        resumes=HALF,
        story=after(
            lambda scene: (
                (scene.folder / "weights").write_bytes(next(scene.cache.glob("models/*/*.safetensors")).read_bytes())
                and None
            ),
            lambda scene: truncate(
                scene, str(next(scene.cache.glob("models/*/*.safetensors")).relative_to(scene.folder))
            ),
        ),
        mend=lambda scene: (
            next(scene.cache.glob("models/*/*.safetensors")).write_bytes((scene.folder / "weights").read_bytes())
            and None
        ),
    ),
]
