"""Run the matrix of faults, two kinds at a time; a run of all kinds rewrites docs/explanation/faults.json and .md."""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.faults.kinds import KINDS
from tests.faults.kinds.kind import Kind
from tests.faults.page import rewrite, write_result
from tests.faults.prepared import Prepared
from tests.faults.verdict import OPEN, Verdict, judge

AT_ONCE = 2


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help="a kind, or how the names of several begin")
    parser.add_argument("--keep", type=Path, help="keep the folders of the runs here")
    parser.add_argument("--result", type=Path, help="write faults.json and faults.md to this folder")
    parser.add_argument("--page", action="store_true", help="only write docs/explanation/faults.md again")
    parser.add_argument("--list", action="store_true", help="only name the kinds")
    options = parser.parse_args()
    if options.page:
        rewrite()
        return 0
    unknown = [name for name in options.kinds if not any(kind.startswith(name) for kind in KINDS)]
    if unknown:
        parser.error(f"no kind is named {', '.join(unknown)}: --list names them")
    chosen = [kind for kind in KINDS.values() if not options.kinds or kind.name.startswith(tuple(options.kinds))]
    if options.list:
        print("\n".join(f"{kind.name:28} {kind.what}" for kind in chosen))
        return 0
    started = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as place:
        verdicts = run_all(chosen, options.keep or Path(place), keep=bool(options.keep))
    seconds = time.monotonic() - started
    if options.result:
        write_result((verdict.as_dict() for verdict in verdicts), seconds=seconds, folder=options.result)
    elif len(chosen) == len(KINDS):
        write_result((verdict.as_dict() for verdict in verdicts), seconds=seconds)
    held = sum(verdict.holds for verdict in verdicts)
    print(f"{held} of {len(verdicts)} kinds hold, in {seconds:.0f} s")
    return int(held < len(verdicts))


def run_all(kinds: Sequence[Kind], folder: Path, *, keep: bool) -> list[Verdict]:
    """An interrupt ends the runs and unmounts their disks."""
    prepared = Prepared(folder / "prepared")
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        return list(pool.map(lambda kind: show(judge(kind, prepared, folder / kind.name, keep=keep)), kinds))
    except KeyboardInterrupt:
        for scene in list(OPEN):
            scene.close()
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(128 + signal.SIGINT)


def show(verdict: Verdict) -> Verdict:
    codes = " then ".join(map(str, verdict.codes))
    print(f"{'ok  ' if verdict.holds else 'FAIL'} {verdict.name:28} {verdict.seconds:5.0f} s  exit {codes}", flush=True)
    for severity, text in verdict.problems:
        print(f"       {severity}: {text}", flush=True)
    return verdict


if __name__ == "__main__":
    sys.exit(main())
