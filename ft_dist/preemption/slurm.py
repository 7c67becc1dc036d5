"""When the job's time limit ends it, and when to stop so that a commit fits in before.

SLURM sets SLURM_JOB_END_TIME (Unix seconds) in the job's environment; where an older or wrapped one does not, `scontrol
show job` says EndTime in local time: https://slurm.schedmd.com/sbatch.html and scontrol.html.
"""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass

SCONTROL_TIMEOUT_S = 10


@dataclass
class TimeLimit:
    """`ends_at` in Unix seconds. `step_s` and `save_s` are what a step and a commit took last, kept up by the loop."""

    ends_at: float
    margin_s: float
    step_s: float = 0.0
    save_s: float = 0.0

    def is_near(self) -> bool:
        """True once another step and a commit no longer fit in front of the margin."""
        return time.time() + self.step_s + self.save_s + self.margin_s >= self.ends_at


def job_ends_at(environment: Mapping[str, str] = os.environ) -> float | None:
    """Unix seconds at which SLURM ends this job; None outside a job and where nobody can tell."""
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
