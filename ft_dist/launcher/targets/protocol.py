"""What a target must do. A new target is one file with a class, and one line in `table.py`."""

from abc import abstractmethod
from pathlib import Path
from typing import ClassVar, Protocol

from ft_dist.errors import UserError
from ft_dist.launcher.record import JobState, LaunchRecord
from ft_dist.launcher.request import Request, RequestedRun
from ft_dist.launcher.submission import Submission
from ft_dist.plan.gpu import Device
from ft_dist.plan.guard import device_called


class Target(Protocol):
    """A kind of cluster to which runs can be submitted. Every method raises UserError for what the user can fix."""

    name: ClassVar[str]
    """As in `--on NAME` and in launch.json"""
    shares_disks: ClassVar[bool] = False
    """The nodes see this machine's file system, so output_dir, data and Python are the same there"""
    on_this_machine: ClassVar[bool] = False
    """This machine is a node, so its own GPUs are the default"""

    @abstractmethod
    def plan(self, request: Request, runs: list[RequestedRun]) -> Submission:
        """Render what `submit` would submit. Write nothing."""

    @abstractmethod
    def submit(self, submission: Submission) -> list[LaunchRecord]:
        """Submit it once its files are in place; return one record per run."""

    @abstractmethod
    def resubmit(self, record: LaunchRecord, folder: Path) -> str:
        """Submit a run again, unchanged; return its new job."""

    @abstractmethod
    def state(self, record: LaunchRecord, folder: Path) -> JobState:
        """State of the run, from the platform or, if that no longer knows the job, from the run folder."""

    @abstractmethod
    def stop(self, record: LaunchRecord) -> str:
        """Ask the run to commit and end; return what was done."""

    def log_command(self, record: LaunchRecord) -> list[str]:
        """The command that shows the log of a run whose record names no log file."""
        raise UserError(f"{record.target}: launch.json names no log. Launch the run again.")

    def while_following(self, record: LaunchRecord) -> None:
        """Called every few seconds while `ft-dist launch` or `ft-dist logs` follows the run."""

    def device(self, request: Request) -> Device | None:
        """The device whose memory the run must fit; None if it is unknown or the run uses none."""
        return device_called(request.profile.gpu) if request.gpus_per_node else None
