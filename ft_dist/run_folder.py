"""Every file name of a run's folder (`output_dir`), spelled once. Scripts rely on them: no name ever changes."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunFolder:
    """Paths below `root`. `ft_dist.checkpoint.commit.format` names the files of a commit."""

    root: Path

    @property
    def config(self) -> Path:
        """The config as resolved when the run last started"""
        return self.root / "config.yaml"

    @property
    def run_record(self) -> Path:
        """The id of the run, which its commits and its mirror repeat"""
        return self.root / "run.json"

    @property
    def lock(self) -> Path:
        """Locked while a run uses the folder, and names its process; the file itself stays"""
        return self.root / "run.lock"

    @property
    def metrics(self) -> Path:
        """One line per step"""
        return self.root / "metrics.jsonl"

    @property
    def events(self) -> Path:
        return self.root / "events.jsonl"

    @property
    def samples(self) -> Path:
        """The sample ids of every step, with data.log_samples=true"""
        return self.root / "samples.jsonl"

    @property
    def data_report(self) -> Path:
        return self.root / "report.json"

    @property
    def summary(self) -> Path:
        """Exists once the run has finished"""
        return self.root / "summary.json"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def final(self) -> Path:
        """The trained model or adapter"""
        return self.root / "final"

    @property
    def micro_rows(self) -> Path:
        """The smaller micro-batch to restart with after running out of memory"""
        return self.root / "micro_rows.json"

    @property
    def wandb_run_id(self) -> Path:
        return self.root / "wandb_run_id"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def launch(self) -> Path:
        """What `ft-dist launch` submitted: the pinned config and the rendered scripts"""
        return self.root / "launch"

    @property
    def secret(self) -> Path:
        """What the agents of several nodes prove to know, while they run; for their user's eyes only"""
        return self.launch / "secret"

    @property
    def launch_record(self) -> Path:
        """Where the run was submitted to, and its job"""
        return self.root / "launch.json"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    def rank_log(self, rank: int) -> Path:
        return self.logs / f"rank-{rank}.log"

    def rank_stacks(self, rank: int) -> Path:
        """The stacks of a rank that hung"""
        return self.logs / f"rank-{rank}-stacks.log"
