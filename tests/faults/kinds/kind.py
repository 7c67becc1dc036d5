"""One kind of fault: what is done to a run, what the run must do, and what its user does next."""

from collections.abc import Callable
from dataclasses import dataclass, field

from tests.faults.scene import Life, Scene
from tests.faults.shim import Rule

NOTHING, AGAIN, MEND = "nothing", "run the same command again", "fix the cause, then run the same command again"

Story = Callable[[Scene], Life]
"""Injects the fault into a run and returns the life that was hit, ended"""


@dataclass(frozen=True)
class Kind:
    """`codes` are the exit codes that are right; `words` is a pattern that the run's output must match.

    A kind without a `story` starts the command with `rules` and `plant` and waits until it ends.
    """

    name: str
    what: str
    phase: str
    codes: tuple[int, ...] = (0,)
    words: str = ""
    then: str = NOTHING
    rules: tuple[Rule, ...] = ()
    plant: dict[str, object] = field(default_factory=dict)
    story: Story | None = None
    mend: Callable[[Scene], None] | None = None
    """Removes the cause before the command is started again; rules and plants are gone anyway"""
    half: bool = False
    """The run was killed half-way before: it resumes while the fault is there"""
    ranks: int = 1
    settings: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    resumes: int | None = None
    """The step after which the first process must begin; None: the newest commit in the run folder"""
    may_lack: tuple[str, ...] = ()
    """Files of the run folder that the fault may leave incomplete"""
    leaves: str = ""
    """A pattern of names that may stay in the run folder"""
    restarts: bool = False
    """The agent restarts the ranks; otherwise the run must continue, or end, by itself"""
    root_only: bool = False
    """Needs root, because it mounts"""

    def play(self, scene: Scene) -> Life:
        if self.story:
            return self.story(scene)
        return scene.play(*self.arguments, rules=self.rules, plant=self.plant)
