"""Tracks what is in memory during a simulated step: by part, with the peak and its moment."""

from collections import defaultdict
from dataclasses import dataclass, field


@dataclass
class Ledger:
    """Bytes of named tensors. `spike` is memory that an operator holds only while it runs."""

    live: dict[str, tuple[str, int]] = field(default_factory=dict)
    parts: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    peak_bytes: int = 0
    peak_parts: dict[str, int] = field(default_factory=dict)
    """By part, including empty ones"""
    peak_moment: str = ""
    timeline: list[tuple[str, int]] = field(default_factory=list)
    moment: str = ""
    total: int = 0

    def at(self, moment: str) -> None:
        """Set the moment for the following calls."""
        self.moment = moment
        self.timeline.append((moment, self.total))

    def hold(self, part: str, name: str, nbytes: float) -> None:
        """Allocate a tensor. A name that is already held grows."""
        before = self.live.get(name, (part, 0))[1]
        self.live[name] = (part, before + int(nbytes))
        self.parts[part] += int(nbytes)
        self.total += int(nbytes)
        self._look(0, "")

    def free(self, *names: str) -> None:
        """Free tensors; names that are not held are ignored."""
        for name in names:
            part, nbytes = self.live.pop(name, ("", 0))
            if nbytes:
                self.parts[part] -= nbytes
                self.total -= nbytes

    def spike(self, part: str, nbytes: float) -> None:
        self._look(int(nbytes), part)

    def _look(self, extra: int, part: str) -> None:
        now = self.total + extra
        if self.timeline and now > self.timeline[-1][1]:
            self.timeline[-1] = (self.timeline[-1][0], now)
        if now > self.peak_bytes:
            self.peak_bytes, self.peak_moment = now, self.moment
            self.peak_parts = dict(self.parts)
            self.peak_parts[part] = self.peak_parts.get(part, 0) + extra
