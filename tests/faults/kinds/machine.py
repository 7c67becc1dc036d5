"""The machine under a run: disks that are full or read-only, limits, shared memory, the clock."""

import os
import resource
from collections.abc import Callable

from tests.faults.kinds.kind import AGAIN, MEND, Kind, Story
from tests.faults.kinds.processes import PAUSE
from tests.faults.scene import Life, Scene
from tests.faults.shim import Rule

FILLER = "filler"
NOT_WRITTEN = "cannot be written.*same command again"
ROOM = "make room, then run the same command again"
DAY_S = 86400


def half_way(change: Callable[[Scene, Life, list[int]], None], *, disk: str = "") -> Story:
    """`disk`: mount options of the run folder, which `change` then fills or remounts."""

    def story(scene: Scene) -> Life:
        if disk:
            scene.mount(scene.run, disk)
        life = scene.start(plant={"pause": PAUSE})
        with scene.paused(life) as ranks:
            change(scene, life, ranks)
        return scene.end(life)

    return story


def fill(scene: Scene, life: Life, ranks: list[int]) -> None:
    try:
        with (scene.run / FILLER).open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
    except OSError:
        return


def fill_inodes(scene: Scene, life: Life, ranks: list[int]) -> None:
    folder = scene.run / FILLER
    folder.mkdir()
    try:
        for number in range(10**6):
            (folder / str(number)).touch()
    except OSError:
        return


def make_room(scene: Scene) -> None:
    import shutil

    place = scene.run / FILLER
    shutil.rmtree(place) if place.is_dir() else place.unlink()


def no_descriptors(scene: Scene, life: Life, ranks: list[int]) -> None:
    for pid in ranks:
        used = max(int(name) for name in os.listdir(f"/proc/{pid}/fd")) + 1
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (used, used))


def few_descriptors(scene: Scene) -> Life:
    return limited(scene, "ulimit -n 32")


def small_files(scene: Scene) -> Life:
    return limited(scene, "ulimit -f 60")


def limited(scene: Scene, limit: str) -> Life:
    scene.prefix = ["/bin/sh", "-c", f'{limit}; exec "$@"', "sh"]
    return scene.play()


def unlimited(scene: Scene) -> None:
    scene.prefix = []


def no_shared_memory(scene: Scene) -> Life:
    mount = 'mount -t tmpfs -o size=4k tmpfs /dev/shm && head -c 4096 /dev/zero > /dev/shm/full; exec "$@"'
    scene.prefix = ["unshare", "-m", "/bin/sh", "-c", mount, "sh"]
    return scene.play()


def no_temporary_files(scene: Scene) -> Life:
    place = scene.folder / "tmp"
    scene.mount(place, "size=4k,nr_inodes=2")
    return scene.play()


def cache_read_only(scene: Scene) -> Life:
    scene.mount(scene.cache, "size=64m")
    scene.remount(scene.cache, "ro")
    return scene.play()


def from_half_way(*rules: Rule) -> Story:
    """The rules apply from the pause on, in every process."""

    def story(scene: Scene) -> Life:
        life = scene.start(plant={"pause": PAUSE}, rules=rules)
        life.shim.disarm()
        with scene.paused(life):
            life.shim.arm()
        return scene.end(life)

    return story


KINDS = [
    Kind(
        "disk-full",
        "the disk of the run fills up",
        "training",
        (2,),
        NOT_WRITTEN,
        ROOM,
        story=half_way(fill, disk="size=8m"),
        mend=make_room,
        root_only=True,
    ),
    Kind(
        "no-inodes",
        "no file can be created on the disk of the run",
        "training",
        (2,),
        NOT_WRITTEN,
        ROOM,
        story=half_way(fill_inodes, disk="size=32m,nr_inodes=200"),
        mend=make_room,
        root_only=True,
    ),
    Kind(
        "read-only",
        "the disk of the run becomes read-only",
        "training",
        (2,),
        NOT_WRITTEN,
        "remount it, then run the same command again",
        # a real remount fails while files are open for writing, unless the kernel does it after an error
        story=from_half_way(*(Rule(call, "*/run/*", "EROFS") for call in ("create", "write", "mkdir"))),
    ),
    Kind(
        "no-descriptors",
        "no file descriptor is left",
        "training",
        (2,),
        NOT_WRITTEN,
        AGAIN,
        story=half_way(no_descriptors),
    ),
    Kind(
        "few-descriptors",
        "ulimit -n 32",
        "start",
        story=few_descriptors,
    ),
    Kind(
        "small-files",
        "ulimit -f: no file may exceed 30 KB",
        "training",
        (2,),
        NOT_WRITTEN,
        "raise the limit, then run the same command again",
        story=small_files,
        mend=unlimited,
    ),
    Kind("no-shared-memory", "/dev/shm is full", "start", story=no_shared_memory, ranks=2, root_only=True),
    Kind(
        "no-temporary-files",
        "TMPDIR is full",
        "start",
        (2,),
        "TMPDIR",
        MEND,
        story=no_temporary_files,
        mend=lambda scene: scene.remount(scene.folder / "tmp", "size=64m,nr_inodes=1000"),
        root_only=True,
    ),
    Kind(
        "cache-read-only",
        "the cache is on a read-only disk, with everything in it",
        "start",
        (2,),
        "data.cache_dir to a writable folder",
        MEND,
        story=cache_read_only,
        mend=lambda scene: scene.remount(scene.cache, "rw"),
        root_only=True,
    ),
    Kind(
        "clock-later",
        "the clock jumps a day ahead",
        "training",
        story=from_half_way(Rule("clock", "", str(DAY_S))),
        ranks=2,
    ),
    Kind(
        "clock-earlier",
        "the clock jumps a day back",
        "training",
        story=from_half_way(Rule("clock", "", str(-DAY_S))),
        ranks=2,
    ),
]
