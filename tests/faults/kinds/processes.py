"""Signals, kills, hangs and errors of the processes of a run, and runs in each other's way."""

import json
import os
import secrets
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress

from tests.conftest import ROOT
from tests.faults.kinds.kind import AGAIN, Kind, Story
from tests.faults.scene import Life, Scene
from tests.launcher.processes import listening, wait_for
from tests.ports import free_port

PAUSE = 8
"""The run pauses before this step; the newest commit is of step 6"""
STOPPED_S = 4.0
HANG = ("engine.hang_timeout_s=15",)
HELD_OUT = (
    "data.eval=[emails/test.jsonl]",
    "evaluate.max_samples=8",
    "evaluate.before=false",
    "evaluate.interval_steps=4",
)

Choice = Callable[[Life, list[int]], list[int]]


def launcher(life: Life, ranks: list[int]) -> list[int]:
    return [life.process.pid]


def last_rank(life: Life, ranks: list[int]) -> list[int]:
    return ranks[-1:]


def every_rank(life: Life, ranks: list[int]) -> list[int]:
    return ranks


def everything(life: Life, ranks: list[int]) -> list[int]:
    return [life.process.pid, *ranks]


def signalled(number: signal.Signals, choice: Choice, *, continue_after_s: float | None = None) -> Story:
    """Send the signal half-way, in the middle of a step."""

    def story(scene: Scene) -> Life:
        life = scene.start(plant={"pause": PAUSE})
        with scene.paused(life) as ranks:
            assert len(ranks) == scene.ranks
            victims = choice(life, ranks)
            for pid in victims:
                os.kill(pid, number)
        if continue_after_s is not None:
            time.sleep(continue_after_s)
            for pid in victims:
                os.kill(pid, signal.SIGCONT)
        return scene.end(life)

    return story


def two_starts(scene: Scene) -> Life:
    """The second is refused while the first trains; the first continues."""
    life = scene.start(plant={"pause": PAUSE})
    with scene.paused(life):
        second = scene.play()
        scene.lives.remove(second)
        assert second.code == 2, f"the second start ended with {second.code}: {second.said[-500:]}"
        assert "is in use by another run" in second.err
        assert len(second.err.strip().splitlines()) == 1
    return scene.end(life)


def edited(change: Callable[[str], str]) -> Story:
    """The recipe changes while the run trains, then a rank dies, so that the ranks are started again."""

    def story(scene: Scene) -> Life:
        recipe = scene.folder / "recipe.yaml"
        shutil.copy(ROOT / "configs/smoke.yaml", recipe)
        scene.recipe = str(recipe)
        life = scene.start(plant={"pause": PAUSE})
        with scene.paused(life) as ranks:
            recipe.write_text(change(recipe.read_text()))
            os.kill(ranks[0], signal.SIGKILL)
        return scene.end(life)

    return story


def two_nodes(lie: Callable[[int], None]) -> Story:
    """Two agents train; half-way, `lie` talks to the port of their rendezvous as a node that does not belong there."""

    def story(scene: Scene) -> Life:
        port, scene.ranks = free_port(), 1
        scene.program = [sys.executable, "-m", "ft_dist.launcher.agent"]
        scene.environment["FT_DIST_SECRET"] = secrets.token_hex(16)
        nodes = ("--nnodes", "2", "--rdzv", f"127.0.0.1:{port}")
        head = scene.start(*nodes, plant={"pause": PAUSE})
        wait_for(lambda: listening(port), [head.process])
        follower = scene.start(*nodes, plant={"pause": PAUSE})
        with scene.paused(head):
            lie(port)
        scene.end(head)
        scene.end(follower)
        assert follower.code == head.code, f"the other node ended with {follower.code}: {follower.said[-500:]}"
        scene.lives.remove(follower)
        return head

    return story


def lies(port: int) -> None:
    hello = {"type": "hello", "protocol": 1, "node": "x", "agent": "x", "run_id": "", "code": "", "config": ""}
    messages = [
        b"[" * 200_000 + b"\n",
        json.dumps({**hello, "nproc": 3_000_000}).encode() + b"\n",
        json.dumps({**hello, "nproc": 0}).replace('"nproc": 0', '"nproc": 1e999').encode() + b"\n",
        b'{"type": "hello"}\n{"type": "ended", "round": 1, "rank": 0, "code": 2}\n',
        os.urandom(4096),
    ]
    with ExitStack() as connections:
        for message in messages * 20:
            connection = connections.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
            with suppress(OSError):
                connection.sendall(message)
        time.sleep(1)


def stopped(name: str, what: str, number: signal.Signals, choice: Choice, **more: object) -> Kind:
    """The run commits its step and asks to be started again."""
    options = {"codes": (75,), "words": r"after step 8; its state is committed", "then": AGAIN} | more
    return Kind(name, what, "training", story=signalled(number, choice), ranks=2, **options)  # type: ignore[arg-type]


def killed(name: str, what: str, choice: Choice, **more: object) -> Kind:
    options = {"words": "killed by SIGKILL.*resumes from the commit of step 6", "restarts": True} | more
    story = signalled(signal.SIGKILL, choice)
    return Kind(name, what, "training", story=story, ranks=2, **options)  # type: ignore[arg-type]


KINDS = [
    stopped("sighup-launcher", "SIGHUP to the launcher: its terminal is gone", signal.SIGHUP, launcher),
    stopped("sighup-all", "SIGHUP to launcher and ranks", signal.SIGHUP, everything),
    stopped("sigterm-launcher", "SIGTERM to the launcher", signal.SIGTERM, launcher),
    stopped("sigterm-rank", "SIGTERM to one rank", signal.SIGTERM, last_rank),
    stopped("sigint-all", "Ctrl-C", signal.SIGINT, everything),
    killed("sigkill-rank", "SIGKILL of one rank in a step", last_rank),
    killed("sigkill-ranks", "SIGKILL of all ranks in a step", every_rank),
    killed("sigkill-launcher", "SIGKILL of the launcher", launcher, codes=(-9,), words="", then=AGAIN, restarts=False),
    killed(
        "sigkill-all", "SIGKILL of launcher and ranks", everything, codes=(-9,), words="", then=AGAIN, restarts=False
    ),
    Kind(
        "sigstop-rank",
        "a rank stops for 4 s (SIGSTOP, SIGCONT)",
        "training",
        story=signalled(signal.SIGSTOP, last_rank, continue_after_s=STOPPED_S),
        ranks=2,
    ),
    Kind(
        "sigstop-launcher",
        "the launcher stops for 4 s",
        "training",
        story=signalled(signal.SIGSTOP, launcher, continue_after_s=STOPPED_S),
        ranks=2,
    ),
    Kind(
        "sigstop-for-ever",
        "a rank stops for ever (SIGSTOP)",
        "training",
        words="made no progress.*resumes from the commit of step 6",
        restarts=True,
        story=signalled(signal.SIGSTOP, last_rank),
        ranks=2,
        settings=HANG,
    ),
    Kind(
        "hang",
        "a rank hangs, and no restart is allowed",
        "training",
        (76,),
        "made no progress",
        AGAIN,
        plant={"hang": 8},
        arguments=("--max-restarts", "0"),
        ranks=2,
        settings=HANG,
    ),
    Kind(
        "die-evaluating",
        "SIGKILL of one rank of two in an evaluation",
        "evaluate",
        words="killed by SIGKILL.*resumes from the commit of step 2",
        plant={"die_evaluating": 1},
        restarts=True,
        ranks=2,
        settings=HELD_OUT,
    ),
    Kind(
        "cuda-error",
        "a CUDA error in one step",
        "training",
        words="CUDA error",
        plant={"raise": [PAUSE, 1]},
        restarts=True,
    ),
    Kind(
        "cuda-error-always",
        "a CUDA error whenever a step is tried",
        "training",
        (1,),
        "CUDA error",
        "look at the GPU, then run the same command again",
        plant={"raise": [PAUSE, 2]},
        restarts=True,
    ),
    Kind("lying-node", "a node that does not belong there sends lies", "training", story=two_nodes(lies), ranks=2),
    Kind("two-starts", "a second start on the same output_dir", "training", story=two_starts),
    Kind(
        "recipe-edited",
        "the recipe's rate is edited before a restart",
        "training",
        words="killed by SIGKILL",
        restarts=True,
        story=edited(lambda text: text.replace("lr: 1.0e-3", "lr: 5.0e-2")),
    ),
    Kind(
        "recipe-half-saved",
        "the recipe is half saved at a restart",
        "training",
        words="killed by SIGKILL",
        restarts=True,
        story=edited(lambda text: text[: len(text) // 2] + "\n  {"),
    ),
]
