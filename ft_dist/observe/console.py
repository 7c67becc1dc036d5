"""Console output on rank 0: one line per step, at most every two seconds."""

import sys
import time
from typing import Any

INTERVAL_S = 2.0


class Console:
    """Prints plain lines, so that a batch job's log reads like the terminal. Silent on other ranks."""

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self._last = 0.0

    def say(self, line: str) -> None:
        if self.enabled:
            print(line, flush=True)

    def note(self, line: str) -> None:
        """Print something that the user may want to act on."""
        self.say(f"note: {line}")

    def step(self, record: dict[str, Any], *, total_steps: int, eta_s: float, mfu: float | None, last: bool) -> None:
        now = time.monotonic()
        if not last and now - self._last < INTERVAL_S:
            return
        self._last = now
        parts = [
            f"step {record['step']}/{total_steps}",
            f"loss {record['loss']:.4f}" if record["loss"] is not None else "loss not finite",
            f"lr {record['lr']:.2e}",
            f"grad {record['grad_norm']:.3f}" if record["grad_norm"] is not None else "grad not finite: skipped",
            f"{record['tokens_per_s']:,.0f} tok/s",
        ]
        if mfu is not None:
            parts.append(f"MFU {mfu:.1%}")
        parts.append(f"ETA {duration(eta_s)}")
        self.say("  ".join(parts))


def duration(seconds: float) -> str:
    whole = int(seconds + 0.5)
    hours, rest = divmod(whole, 3600)
    minutes, secs = divmod(rest, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{secs:02d}s" if minutes else f"{secs}s"


def print_error(message: str) -> None:
    print(f"ft-dist: error: {message}", file=sys.stderr, flush=True)
