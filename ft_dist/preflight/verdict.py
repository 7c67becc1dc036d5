"""Finds the problems of a world in the facts of its ranks. Each line has the node, the value and the fix."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

Facts = dict[str, Any]

LEAST_DISK_BYTES = 2**30
LEAST_FREE_GPU = 0.9
"""Share of a GPU's memory; with less, another program is using it"""
LARGEST_SKEW_S = 5.0
SLOW_FACTOR = 3.0


@dataclass(frozen=True)
class Problem:
    """`fatal`: training would fail or be wrong. Other problems are reported, and fail only `ft-dist check --env`."""

    line: str
    fatal: bool


def problems(ranks: Sequence[Facts]) -> list[Problem]:
    """`ranks` are in rank order, rank 0 first."""
    found = [
        *_differing(ranks, "world_size", lambda f: f["world_size"], "Start all ranks with the same WORLD_SIZE."),
        *_differing(ranks, "ft_dist's source", lambda f: f["code"], "Install the same ft_dist on every node."),
        *_differing(ranks, "the resolved config", lambda f: f["config"], "Give all nodes the same file and overrides."),
    ]
    packages = sorted({package for facts in ranks for package in facts["versions"]})
    for package in packages:
        fix = "Install the same version on every node." if package != "cuda" else "Install the same build of torch."
        # the Python version does not change any result
        found += _differing(ranks, package, partial(_version, package), fix, fatal=package != "python")
    found += _differing(
        ranks, "GPU", lambda f: (f["gpu"] or {}).get("name"), "The slowest sets the pace; use equal GPUs.", fatal=False
    )
    asked = [facts for facts in ranks if facts["gpu"] and facts["gpu"]["driver"]]
    found += _differing(
        asked, "GPU driver", lambda f: f["gpu"]["driver"], "Install the same version on every node.", fatal=False
    )
    machines = len({facts["machine"] for facts in ranks})
    for facts in _one_per_node(ranks):
        found += _node_problems(facts, len(ranks), machines)
    for facts in ranks:
        found += gpu_problems(facts)
    return found


def clock_problems(ranks: Sequence[Facts], skews_s: Sequence[float], uncertain_s: float) -> list[Problem]:
    """`skews_s`: each rank's clock minus rank 0's, accurate to `uncertain_s`."""
    found = []
    skew_of = {facts["node"]: skew for facts, skew in zip(ranks, skews_s, strict=True)}
    for node, skew in skew_of.items():
        if abs(skew) > LARGEST_SKEW_S + uncertain_s:
            line = (
                f"{node}: its clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} {ranks[0]['node']}'s, "
                f"more than {LARGEST_SKEW_S:.0f} s. Time limits and object stores depend on it: synchronise it "
                "with a time server."
            )
            found.append(Problem(line, fatal=False))
    return found


def speed_problems(ranks: Sequence[Facts], seconds: Sequence[float]) -> list[Problem]:
    """`seconds`: each rank's time for the same work."""
    typical = sorted(seconds)[(len(seconds) - 1) // 2]
    return [
        Problem(
            f"{facts['node']}: rank {facts['rank']} took {taken * 1e3:.1f} ms for work that takes others "
            f"{typical * 1e3:.1f} ms ({taken / typical:.0f} times; {SLOW_FACTOR:.0f} are allowed). Every step waits "
            "for it: check what else runs there, or exclude the node.",
            fatal=False,
        )
        for facts, taken in zip(ranks, seconds, strict=True)
        if taken > SLOW_FACTOR * typical
    ]


def _node_problems(facts: Facts, world_size: int, machines: int) -> list[Problem]:
    node, found = facts["node"], []
    if not facts.get("sees_output", True):
        line = (
            f"{node}: output_dir={facts['output_dir']} does not show what rank 0 writes there. All nodes need it on "
            "one shared file system, mounted at the same path."
        )
        found.append(Problem(line, fatal=True))
    if facts["free_disk"] < LEAST_DISK_BYTES:
        line = (
            f"{node}: {facts['free_disk'] / 2**20:.0f} MiB are free for output_dir, less than "
            f"{LEAST_DISK_BYTES / 2**20:.0f}. Make room, or choose another output_dir."
        )
        found.append(Problem(line, fatal=False))
    needed = 256 + 4 * world_size
    if facts["open_files"] < needed:
        line = (
            f"{node}: at most {facts['open_files']} files may be open (ulimit -n), but {world_size} ranks need "
            f"{needed}. Run `ulimit -n {max(4096, needed)}` first, or raise the limit of the service that starts it."
        )
        found.append(Problem(line, fatal=True))
    place = facts["address"]
    if machines > 1 and (place["address"].startswith("127.") or not place["address"]):
        line = (
            f"{node}: gloo would use {place['interface'] or 'no interface'} "
            f"({place['address'] or 'no address'}), which other machines cannot reach. "
            "Set GLOO_SOCKET_IFNAME to the interface of their network."
        )
        found.append(Problem(line, fatal=True))
    if facts["gpu"] and facts["local_size"] > facts["gpu"]["count"]:
        line = (
            f"{node}: {facts['local_size']} ranks for {facts['gpu']['count']} visible GPUs. Use --nproc "
            f"{facts['gpu']['count']}, or make more visible (CUDA_VISIBLE_DEVICES)."
        )
        found.append(Problem(line, fatal=True))
    return found


def gpu_problems(facts: Facts) -> list[Problem]:
    """Of one rank; uses the facts `node`, `rank` and `gpu` alone."""
    gpu, where = facts["gpu"], f"{facts['node']}: the GPU of rank {facts['rank']}"
    if not gpu:
        return []
    if gpu["fault"]:
        return [Problem(f"{where} does not work: {gpu['fault']}. Exclude the node; see dmesg.", fatal=True)]
    found = []
    if gpu["errors"]:
        line = f"{where} has had {', '.join(gpu['errors'])}. Reset it (nvidia-smi -r), or exclude the node."
        found.append(Problem(line, fatal=False))
    if gpu["total"] and gpu["free"] < LEAST_FREE_GPU * gpu["total"]:
        line = (
            f"{where} has {gpu['free'] / 2**30:.1f} of {gpu['total'] / 2**30:.1f} GiB free. Another program holds the "
            "rest: stop it (nvidia-smi shows it)."
        )
        found.append(Problem(line, fatal=False))
    return found


def _differing(
    ranks: Sequence[Facts], what: str, value: Callable[[Facts], Any], fix: str, *, fatal: bool = True
) -> list[Problem]:
    """One problem per node whose value differs from that of most ranks (in a tie, from that of rank 0)."""
    if not ranks:
        return []
    counts = Counter(value(facts) for facts in ranks)
    usual = max(counts, key=lambda key: (counts[key], key == value(ranks[0])))
    others = {facts["node"]: value(facts) for facts in ranks if value(facts) != usual}
    reference = next(facts["node"] for facts in ranks if value(facts) == usual)
    return [
        Problem(f"{node}: {what} is {found}, but {usual} on {reference}. {fix}", fatal)
        for node, found in others.items()
    ]


def _version(package: str, facts: Facts) -> str:
    return str(facts["versions"].get(package, "missing"))


def _one_per_node(ranks: Sequence[Facts]) -> list[Facts]:
    """One rank per node: one that does not see rank 0's output, if any."""
    worst: dict[str, Facts] = {}
    for facts in ranks:
        kept = worst.setdefault(facts["node"], facts)
        if kept.get("sees_output", True) and not facts.get("sees_output", True):
            worst[facts["node"]] = facts
    return list(worst.values())
