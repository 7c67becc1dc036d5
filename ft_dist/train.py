"""A run from its config to its final weights. `python -m ft_dist.train CONFIG [key=value ...]` is one rank of it.

torchrun, srun and `ft-dist train` all start this module. In order: check, prepare data, join the world, build the
engine, resume, step until done, evaluate, write the result.
"""

import gc
import os
import sys
import traceback
from contextlib import suppress
from typing import TYPE_CHECKING

from ft_dist.config import RunConfig, worker_config
from ft_dist.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_PREEMPTED, EXIT_USER, Preempted, TrainingError, UserError
from ft_dist.observe.streams import secure_streams
from ft_dist.preemption.signals import ignore, listen
from ft_dist.preemption.stop import StopRequest
from ft_dist.run_folder import RunFolder

if TYPE_CHECKING:
    from ft_dist.data.stream.batch import Prefetched
    from ft_dist.run.run import Run


def main(argv: list[str] | None = None) -> int:
    """Run one rank; returns its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    # Imports create a million objects that stay; collecting garbage among them took a sixth of the start-up time.
    # `prepare_run` enables it again.
    gc.disable()
    secure_streams()
    stop = StopRequest()
    listen(stop)
    try:
        if not arguments:
            raise UserError("no config given. Usage: python -m ft_dist.train CONFIG [key=value ...]")
        train(worker_config(arguments), stop)
        ignore()
    except (UserError, TrainingError) as error:
        report_error(error)
        return EXIT_USER if isinstance(error, UserError) else EXIT_FAILED
    except Preempted:
        return EXIT_PREEMPTED
    finally:
        gc.unfreeze()  # so that shutdown frees what libraries would otherwise report as leaked
    return EXIT_FINISHED


def train(config: RunConfig, stop: StopRequest) -> None:
    """Train on this rank, together with the other ranks that the environment names.

    Raises UserError, Preempted or TrainingError.
    """
    from ft_dist.model.quiet import quiet_process

    quiet_process()
    from ft_dist.run.warm_memory import touch_planned

    free_memory = touch_planned(config)  # on a thread, during the imports
    from ft_dist.distributed import fault_of_machine
    from ft_dist.run.out_of_memory import explain_out_of_memory
    from ft_dist.run.start import prepare_run

    run = prepare_run(config, stop, free_memory=free_memory)
    try:
        with explain_out_of_memory(run.config, run.world, flash=run.engine.flash):
            before = run.evaluate("before") if config.evaluate.before else None
            stop.training_started()
            step_until_done(run, stop)
            run.finish_commits(insist=True)
            stop.training_ended()
            run.load_best()
            run.write_final()
            after = run.evaluate("after")
            run.summarise(before=before, after=after)
    except Exception as error:
        fault = fault_of_machine(error)
        if fault is None:
            raise
        log = RunFolder(run.config.run_dir).rank_log(run.world.rank)
        with suppress(OSError), log.open("a", encoding="utf-8") as file:
            file.write(traceback.format_exc())
        raise TrainingError(f"rank {run.world.rank} at step {run.step}: {fault}. {log} has the traceback.") from error
    finally:
        run.close()


def report_error(error: Exception) -> None:
    """Print one line. Before the world is joined, all ranks of a node fail with the same error, so one prints it."""
    import torch.distributed as dist

    from ft_dist.observe.console import print_error

    if dist.is_initialized() or int(os.environ.get("LOCAL_RANK", 0)) == 0:
        print_error(str(error))


def step_until_done(run: "Run", stop: StopRequest) -> None:
    """The training loop: from the first or the resumed step to the last."""
    if run.evaluation_is_due():  # the run was stopped before it was done
        evaluate_and_commit(run)
    for index, batch in enumerate(run.batches()):
        if index == 1:
            _collect_from_start_up()
        take_step(run, stop, batch)
        evaluate_and_commit(run)
    run.explain_early_stop()


def evaluate_and_commit(run: "Run") -> None:
    """What is due after a step. The commit comes last: it holds the held-out loss of its own step."""
    if run.evaluation_is_due():
        run.evaluate("during")
    if run.commit_is_due():
        run.commit()


def _collect_from_start_up() -> None:
    """Once, after the first step, so that it does not delay that step: a pass over all imported objects takes 0.4 s."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def take_step(run: "Run", stop: StopRequest, batch: "Prefetched") -> None:
    """Run and record one optimizer step on this rank's share of a global batch. Raises Preempted, TrainingError."""
    from ft_dist.distributed import announce_fault
    from ft_dist.engine.step import StepSums
    from ft_dist.optim.schedule import learning_rate

    waited_s = run.clock.lap()
    run.seed_step()
    step, every = run.step + 1, run.config.engine.verify_steps
    rate = learning_rate(run.config.optim, step=step, total_steps=run.total_steps)
    padded = sum(micro_batch.padded_tokens for micro_batch in batch.micro_batches)
    computed = sum(run.engine.objective.computed_tokens(micro_batch) for micro_batch in batch.micro_batches)
    if batch.error:
        announce_fault(str(batch.error))  # before the step, after which all ranks look for it
    result = run.engine.train_step(
        batch.micro_batches,
        weight=run.engine.objective.weight(batch.batch),
        learning_rate=rate,
        to_sum=lambda: StepSums(float(stop.wanted), float(padded), float(computed)),
        abandon=batch.given_up,
        verify_as=step if every and step % every == 0 else None,
    )
    if result.abandoned:
        run.leave_abandoned(batch.error)
    run.finish_step(batch, result, learning_rate=rate, waited_s=waited_s, step_s=run.clock.lap() - result.held_up_s)
    if result.sums.stop_wanted > 0:
        run.leave_preempted()


if __name__ == "__main__":
    sys.exit(main())
