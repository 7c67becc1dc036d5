"""Faults of the second place for commits: they cost a copy at most."""

import shutil

from tests.faults.kinds.damage import NEWEST, truncate
from tests.faults.kinds.kind import MEND, Kind
from tests.faults.scene import HALF, INTERVAL, Life, Scene
from tests.faults.shim import Rule
from tests.object_store import Proxy
from tests.object_store import Rule as Answer


def to_mirror(scene: Scene) -> None:
    scene.settings.append("checkpoint.path=mirror")


def mirrored(*rules: Rule):  # type: ignore[no-untyped-def]
    def story(scene: Scene) -> Life:
        to_mirror(scene)
        return scene.play(rules=rules)

    return story


def store(*answers: Answer, outage_s: float = 0.0):  # type: ignore[no-untyped-def]
    """The story: a real S3 server behind a proxy that fails as `answers` say, or that is down for a while."""
    import threading
    import time

    from tests.object_store import fault_proxy, object_store

    def story(scene: Scene) -> Life:
        with object_store(scene.folder / "objects") as server, fault_proxy(server.port) as proxy:
            proxy.rules += [Answer(one.match, one.answer, one.times) for one in answers]
            scene.environment |= proxy.environment
            scene.settings.append(f"checkpoint.path={server.url}/run")
            life = scene.start()
            if outage_s:
                threading.Thread(target=outage, args=(server, proxy), daemon=True).start()
            scene.end(life)
            copied = {path.parent.name for path in server.folder.rglob("manifest.json")}
            assert "step-00000012" in copied, f"the newest copy is not there, only {sorted(copied)}: {life.said[-600:]}"
            return life

    def outage(server: object, proxy: Proxy) -> None:
        while not any("PUT" in request for request in proxy.requests):
            time.sleep(0.01)
        server.kill()  # type: ignore[attr-defined]
        time.sleep(outage_s)
        server.start()  # type: ignore[attr-defined]

    return story


def lost_commit(scene: Scene) -> Life:
    """The run's disk lost everything that the mirror has."""
    shutil.copytree(scene.root, scene.mirror)
    to_mirror(scene)
    shutil.rmtree(scene.run)
    return scene.play()


def damaged_commit(scene: Scene) -> Life:
    shutil.copytree(scene.root, scene.mirror)
    to_mirror(scene)
    truncate(scene, f"run/checkpoints/{NEWEST}/rank-00000.safetensors")
    return scene.play()


def damaged_copy(scene: Scene) -> Life:
    shutil.copytree(scene.root, scene.mirror)
    to_mirror(scene)
    shutil.rmtree(scene.root)
    truncate(scene, f"mirror/{NEWEST}/rank-00000.safetensors")
    return scene.play()


def own_folder(scene: Scene) -> Life:
    scene.settings.append("checkpoint.path=run/checkpoints")
    return scene.play()


def linked_folder(scene: Scene) -> Life:
    scene.mirror.symlink_to(scene.root)
    to_mirror(scene)
    return scene.play()


def no_mirror(scene: Scene) -> None:
    scene.settings[:] = [line for line in scene.settings if not line.startswith("checkpoint.path=")]


def of_another_run(scene: Scene) -> Life:
    """A run with another rate and folder has its copies there."""
    to_mirror(scene)
    other = Scene(scene.folder, settings=[*scene.settings, "optim.lr=0.01", "output_dir=other"])
    life = other.play()
    assert life.code == 0, life.said
    (scene.folder / "trace").unlink()
    return scene.play()


def outside(scene: Scene) -> Life:
    """A manifest in the mirror names a file outside the commit."""
    import json

    import xxhash

    shutil.copytree(scene.root, scene.mirror)
    to_mirror(scene)
    shutil.rmtree(scene.run)
    path = scene.mirror / NEWEST / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["xxh3"]
    (scene.folder / "planted").write_text("x")
    content = (scene.mirror / NEWEST / "state.json").read_bytes()
    manifest["files"]["../../../escaped"] = {"bytes": len(content), "xxh3": xxhash.xxh3_128_hexdigest(content)}
    (scene.folder / "escaped").write_bytes(content)
    own = xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())
    path.write_text(json.dumps(manifest | {"xxh3": own}))
    (scene.folder / "escaped").chmod(0o600)
    before = (scene.folder / "escaped").stat().st_ino
    life = scene.play()
    assert (scene.folder / "escaped").stat().st_ino == before, "a file outside the commit was written"
    return life


NOT_COPIED = "was not copied"
KINDS = [
    Kind(
        "mirror-enospc",
        "disk of the mirror full for one copy",
        "mirror copy",
        story=mirrored(Rule("write", "*/mirror/step-*", "ENOSPC", 1)),
    ),
    Kind(
        "mirror-eio",
        "three writes to the mirror fail (EIO)",
        "mirror copy",
        story=mirrored(Rule("write", "*/mirror/step-*", "EIO", 3)),
    ),
    Kind(
        "mirror-edquot-always",
        "the quota of the mirror is used up",
        "mirror copy",
        words=NOT_COPIED,
        story=mirrored(Rule("write", "*/mirror/step-*", "EDQUOT")),
    ),
    Kind(
        "mirror-mkdir-erofs",
        "the mirror is on a read-only disk",
        "mirror copy",
        words=NOT_COPIED,
        story=mirrored(Rule("mkdir", "*/mirror/step-*", "EROFS")),
    ),
    Kind(
        "mirror-kill",
        "SIGKILL while a commit is copied",
        "mirror copy",
        words="killed by SIGKILL",
        restarts=True,
        story=mirrored(Rule("create", "*/mirror/step-*state.json*", "KILL", 1, skip=1)),
    ),
    Kind(
        "mirror-500",
        "the object store answers 500 and 503",
        "mirror copy",
        story=store(Answer("PUT", 500, 3), Answer("PUT", 503, 2), Answer("GET", 500, 1)),
    ),
    Kind("mirror-outage", "the object store is down for 5 s", "mirror copy", story=store(outage_s=5.0)),
    Kind("mirror-lost-answer", "the store's answers are lost", "mirror copy", story=store(Answer("PUT", "lose", 2))),
    Kind(
        "mirror-only",
        "the run folder is gone, the mirror is intact",
        "resume",
        half=True,
        resumes=HALF,
        story=lost_commit,
        may_lack=("metrics.jsonl", "samples.jsonl"),
    ),
    Kind(
        "mirror-instead",
        "the newest commit is damaged, its copy is intact",
        "resume",
        words="rank-00000.safetensors",
        half=True,
        resumes=HALF,
        story=damaged_commit,
        leaves=r"\.damaged",
    ),
    Kind(
        "mirror-damaged",
        "no local commit, and the newest copy is damaged",
        "resume",
        words="rank-00000.safetensors",
        half=True,
        resumes=HALF - INTERVAL,
        story=damaged_copy,
    ),
    Kind(
        "mirror-start-erofs",
        "nothing can be written to the mirror of a new run",
        "start",
        (2,),
        "mirror",
        MEND,
        story=mirrored(Rule("mkdir", "*/mirror", "EROFS")),
    ),
    Kind(
        "mirror-own-folder",
        "checkpoint.path is the run's own checkpoints/",
        "start",
        (2,),
        "checkpoint.path",
        MEND,
        half=True,
        resumes=HALF,
        story=own_folder,
        mend=no_mirror,
    ),
    Kind(
        "mirror-own-link",
        "checkpoint.path is a link to the run's own checkpoints/",
        "start",
        (2,),
        "checkpoint.path",
        MEND,
        half=True,
        resumes=HALF,
        story=linked_folder,
        mend=no_mirror,
    ),
    Kind(
        "mirror-of-another-run",
        "checkpoint.path has the copies of another run",
        "start",
        (2,),
        "checkpoint.path",
        MEND,
        resumes=0,
        story=of_another_run,
        mend=no_mirror,
    ),
    Kind(
        "mirror-names-outside",
        "a manifest in the mirror names ../../../escaped",
        "resume",
        words="escaped",
        half=True,
        resumes=HALF - INTERVAL,
        story=outside,
        may_lack=("metrics.jsonl", "samples.jsonl"),
    ),
]
