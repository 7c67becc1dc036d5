"""Every command of docs/plan.md runs as it stands."""

import os
import re
import shlex
import subprocess

from benchmarks.plan.__main__ import plot
from tests.conftest import CLI, ROOT

PAGE = ROOT / "docs" / "plan.md"


def test_the_commands_of_the_page(tmp_path):
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines() if line.strip()]
    assert len(commands) == 5
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    for command in commands:
        words = shlex.split(command)
        assert words[0] == "ft-dist"
        environment = os.environ | {"PYTHONPATH": path}
        done = subprocess.run([*CLI, *words[1:]], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stderr)
        assert done.stdout
    assert (tmp_path / "plan.html").exists()


def test_the_plot_is_what_the_plan_says_now():
    """`python -m benchmarks.plan` draws it again."""
    assert (ROOT / "docs" / "plan-scaling.svg").read_text() == plot()
