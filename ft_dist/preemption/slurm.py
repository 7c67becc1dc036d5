"""The job's time limit, and when to stop so that a commit still fits.

SLURM sets SLURM_JOB_END_TIME (Unix seconds) in the job's environment; if an older or wrapped SLURM does not,
`scontrol show job` prints EndTime in local time: https://slurm.schedmd.com/sbatch.html and scontrol.html.
"""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

SCONTROL_TIMEOUT_S = 10


@dataclass
class TimeLimit:
    """`ends_at` in Unix seconds. The loop updates `step_s` and `save_s`, the durations of the last step and commit.

    The clock of the machine is read once: if it is set later, the time that is left stays the same.
    """

    ends_at: float
    margin_s: float
    step_s: float = 0.0
    save_s: float = 0.0
    _deadline: float = field(init=False)

    def __post_init__(self) -> None:
        self._deadline = time.monotonic() + self.ends_at - time.time()

    def is_near(self) -> bool:
        """True once another step and a commit no longer fit before the margin."""
        return time.monotonic() + self.step_s + self.save_s + self.margin_s >= self._deadline


def job_ends_at(environment: Mapping[str, str] = os.environ) -> float | None:
    """Unix seconds at which SLURM ends this job; None outside a job or if it is unknown."""
    stated = environment.get("SLURM_JOB_END_TIME", "")
    if stated.isdigit() and int(stated) > 0:
        return float(stated)
    job = environment.get("SLURM_JOB_ID")
    scontrol = shutil.which("scontrol", path=environment.get("PATH"))
    if not job or not scontrol:
        return None
    try:
        shown = subprocess.run(
            [scontrol, "show", "job", "--oneliner", job],
            capture_output=True,
            text=True,
            timeout=SCONTROL_TIMEOUT_S,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"\bEndTime=(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)", shown)
    return time.mktime(time.strptime(found[1], "%Y-%m-%dT%H:%M:%S")) if found else None
