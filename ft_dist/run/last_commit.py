"""Repeats a commit that failed before the run ends without it: a disk that is full now may get room.

It waits as long as the steps took that would be lost, but not longer than LONGEST_S.
"""

import time
from collections.abc import Callable

from ft_dist.distributed import World, max_over_ranks
from ft_dist.preemption.stop import StopRequest

LONGEST_S = 600.0
AFTER_NOTICE_S = 20.0
"""Seconds after a stop request: the machine goes away soon"""
SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 2.0, 20.0
"""Between tries; each that fails is logged, so the pauses grow"""


def repeat_failed_commit(
    commit: Callable[[], None],
    *,
    failed: Callable[[], bool],
    unsaved_s: float,
    world: World,
    stop: StopRequest,
    note: Callable[[str], None],
) -> None:
    """Call `commit`, which waits for its end, while it has `failed`. All ranks call it.

    `failed` is asked on rank 0 only, as is `unsaved_s`, the seconds since the last commit that succeeded.
    """
    started = time.monotonic()
    limit_s = min(LONGEST_S, unsaved_s)
    noted, pause_s = False, SHORTEST_PAUSE_S
    while True:
        again = False
        if world.is_main and failed():
            left_s = limit_s - (time.monotonic() - started)
            again = (min(left_s, AFTER_NOTICE_S - stop.wanted_for_s) if stop.wanted else left_s) > 0
            if again and not noted:
                noted = True
                note(f"the last steps are not saved: trying again for up to {left_s:.0f} s")
        if not max_over_ranks(float(again), world):
            return
        time.sleep(pause_s)
        pause_s = min(1.5 * pause_s, LONGEST_PAUSE_S)
        commit()
