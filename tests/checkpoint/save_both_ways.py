"""One rank of a run that stops after a few steps and saves its state twice: as a commit and as DeepSpeed's checkpoint.

`python -m tests.checkpoint.save_both_ways FOLDER CONFIG [key=value ...]`
"""

import sys

from ft_dist.config import load_config
from ft_dist.model.quiet import quiet_process
from ft_dist.optim.schedule import learning_rate
from ft_dist.preemption.stop import StopRequest


def main() -> None:
    folder, recipe, *overrides = sys.argv[1:]
    quiet_process()
    from ft_dist.run.start import prepare_run

    run = prepare_run(load_config(recipe, overrides), StopRequest(), free_memory=lambda: None)
    for batch in run.batches():
        run.seed_step()
        rate = learning_rate(run.config.optim, step=run.step + 1, total_steps=run.total_steps)
        result = run.engine.train_step(
            batch.micro_batches,
            weight=batch.batch.labelled_tokens,
            learning_rate=rate,
        )
        run.finish_step(batch, result, learning_rate=rate, waited_s=0.0, step_s=1.0)
    run.commit()
    run.engine.deepspeed.save_checkpoint(folder)
    run.finish_commits()
    run.close()


if __name__ == "__main__":
    main()
