"""How many machines a run takes: `4`, or `2:4` for an elastic run on two to four."""

import re
from dataclasses import dataclass

from ft_dist.errors import UserError


@dataclass(frozen=True)
class Nodes:
    """At most `most` machines, and never fewer than `least`."""

    least: int
    most: int

    def __str__(self) -> str:
        return str(self.most) if self.least == self.most else f"{self.least}:{self.most}"

    @property
    def elastic(self) -> bool:
        return self.least < self.most


ONE_NODE = Nodes(1, 1)


def parse_nodes(text: str, *, option: str) -> Nodes:
    """Parse the value of `option`. Raises UserError."""
    found = re.fullmatch(r"([0-9]+)(?::([0-9]+))?", text)
    if found:
        least, most = int(found[1]), int(found[2] or found[1])
        if 1 <= least <= most:
            return Nodes(least, most)
    raise UserError(f"{option} {text}: should be a positive number such as 4, or MIN:MAX such as 2:4.")
