"""Run the matrix of faults: `python -m tests.faults [KIND ...]`."""

import argparse
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.faults.kinds import KINDS
from tests.faults.prepared import Prepared
from tests.faults.verdict import Verdict, judge

AT_ONCE = 2


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help="name of a kind, or the beginning of several names")
    parser.add_argument("--keep", type=Path, help="keep the folders of the runs here")
    parser.add_argument("--list", action="store_true", help="only name the kinds")
    options = parser.parse_args()
    chosen = [kind for kind in KINDS.values() if not options.kinds or kind.name.startswith(tuple(options.kinds))]
    if options.list:
        print("\n".join(f"{kind.name:28} {kind.what}" for kind in chosen))
        return 0
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as place:
        folder = options.keep or Path(place)
        prepared = Prepared(folder / "prepared")
        with ThreadPoolExecutor(AT_ONCE) as pool:
            verdicts = list(
                pool.map(lambda kind: show(judge(kind, prepared, folder / kind.name, keep=bool(options.keep))), chosen)
            )
    failed = [verdict for verdict in verdicts if not verdict.holds]
    print(f"{len(verdicts) - len(failed)} of {len(verdicts)} kinds hold, in {time.monotonic() - started:.0f} s")
    return int(bool(failed))


def show(verdict: Verdict) -> Verdict:
    codes = " then ".join(map(str, verdict.codes))
    print(f"{'ok  ' if verdict.holds else 'FAIL'} {verdict.name:28} {verdict.seconds:5.0f} s  exit {codes}", flush=True)
    for severity, text in verdict.problems:
        print(f"       {severity}: {text}", flush=True)
    return verdict


if __name__ == "__main__":
    sys.exit(main())
