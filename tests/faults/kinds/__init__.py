"""The kinds of fault, one file per group."""

from tests.faults.kinds import commits, damage, machine, mirror, processes, records, resume, start
from tests.faults.kinds.kind import Kind

KINDS: dict[str, Kind] = {
    kind.name: kind
    for group in (start, records, commits, mirror, resume, damage, processes, machine)
    for kind in group.KINDS
}
