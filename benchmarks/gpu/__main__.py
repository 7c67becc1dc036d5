"""`python -m benchmarks.gpu`: measure one GPU inside a fixed time; see `benchmarks/gpu.sh`. Standard library only."""

import argparse
import datetime
import os
import platform
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.gpu.driver import MAX_BYTES, ROOT, Driver, say
from benchmarks.gpu.stages import STAGES, Stage, table
from benchmarks.gpu.wheels import install

NAMES = [stage.name for stage in STAGES]


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    stages = [stage for stage in STAGES if not options.only or stage.name in options.only]
    if options.list:
        print(table(stages))
        return 0
    if not options.dry_run and not has_gpu():
        print("found no GPU (/dev/nvidia*, /dev/kfd); --dry-run runs the stages on CPU", file=sys.stderr)
        return 2
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    work = options.work or Path(tempfile.mkdtemp(prefix="ft_dist-gpu-"))
    driver = Driver(options.out, work.resolve(), options.total_s, dry=options.dry_run)
    try:
        return 1 if run(driver, stages, options) else 0
    finally:
        bound(driver)
        if not options.work:
            shutil.rmtree(work, ignore_errors=True)


def run(driver: Driver, stages: list[Stage], options: argparse.Namespace) -> int:
    driver.row(
        "script",
        "run",
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        dry=driver.dry,
        total_s=driver.total_s,
        python=platform.python_version(),
        machine=platform.machine(),
        cores=os.cpu_count(),
        stages={stage.name: stage.seconds for stage in stages},
    )
    if options.triton_cache:
        shutil.copytree(options.triton_cache, driver.work / "triton", dirs_exist_ok=True)
    if options.wheels:
        driver.site = driver.work / "site"
        done = install(options.wheels, driver.site)
        driver.row("script", "wheels", **done)
        say(f"{'wheels':16} {done['wheels']} in {done['seconds']:.1f} s; failed: {done['failed'] or 'none'}")
    bad = driver.run_all(stages)
    driver.row("script", "end", not_done=bad)
    say(f"{len(stages) - bad} of {len(stages)} stages as planned; {driver.results}, {driver.log}")
    return bad


def bound(driver: Driver) -> None:
    """Drop every file over MAX_BYTES except the log, and record each as a row."""
    for path in sorted(driver.out.iterdir()):
        if path.is_file() and path not in (driver.log, driver.results) and path.stat().st_size > MAX_BYTES:
            driver.row("script", "left out", file=path.name, bytes=path.stat().st_size)
            path.unlink()


def has_gpu() -> bool:
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists() or shutil.which("nvidia-smi") is not None


def _leave(number: int, _: Any) -> NoReturn:
    raise SystemExit(128 + number)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=__doc__.partition("\n")[0])
    path = lambda text: Path(text).resolve()  # noqa: E731
    out = os.environ.get("OUT") or ROOT / "benchmarks" / "results" / "gpu"
    parser.add_argument("--out", type=path, default=out, help="folder for results.jsonl, log.txt and the profile")
    parser.add_argument("--work", type=path, help="folder for caches and runs, kept (default: a temporary one)")
    parser.add_argument("--wheels", type=path, default=os.environ.get("WHEELS") or None, help="folder of wheels")
    parser.add_argument("--triton-cache", type=path, help="kernels compiled earlier, to start from")
    parser.add_argument("--total-s", type=float, default=560.0, help="stop before this many seconds")
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="STAGE", help=f"run only these: {', '.join(NAMES)}")
    parser.add_argument("--dry-run", action="store_true", help="run the same stages on CPU with tiny shapes")
    parser.add_argument("--list", action="store_true", help="print the stages with their seconds")
    options = parser.parse_args(arguments)
    options.out, options.wheels = Path(options.out), options.wheels and Path(options.wheels).resolve()
    return options


if __name__ == "__main__":
    sys.exit(main())
