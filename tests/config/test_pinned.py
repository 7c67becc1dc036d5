"""A worker reads the config that its agent pinned, whatever the values look like, and however many workers read it."""

import subprocess
import sys

import pytest

from ft_dist.config import PINNED, dump_config, load_config, pin
from ft_dist.errors import ConfigError

READ = """
import sys
from ft_dist.config import dump_config, worker_config
print(dump_config(worker_config(sys.argv[1:])), end="")
"""


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["optim.epochs=3"],
        # YAML would read these as a number, a boolean and nothing
        ["output_dir='1e5'", "observe.run_name='true'", "observe.wandb_project='~'"],
        ["model.path='~/models/é  x'", "model.new_tokens=[" + ",".join(f"<{i}>" for i in range(9_000)) + "]"],
        ["data.train=[{path: ./emails/train.jsonl, columns: {prompt: text}}]", "method.target_modules=q_proj"],
    ],
)
def test_every_worker_reads_the_same_config(overrides):
    config = load_config("smoke", overrides)
    with pin(config) as file:
        workers = [
            subprocess.Popen(
                [sys.executable, "-c", READ, PINNED, "no-such-recipe", *overrides[:1]],
                stdin=file,
                stdout=subprocess.PIPE,
                text=True,
                encoding="utf-8",
            )
            for _ in range(2)
        ]
        found = [worker.communicate()[0] for worker in workers]
    assert found == [dump_config(config)] * 2


def test_without_an_agent_a_worker_reads_the_recipe():
    done = subprocess.run([sys.executable, "-c", READ, "smoke", "seed=4"], capture_output=True, text=True)
    assert done.stdout == dump_config(load_config("smoke", ["seed=4"]))
    with pytest.raises(ConfigError, match="no such config file"):
        load_config(PINNED)
