"""One rank of a measurement: `python -m ft_dist.bench.rank SPEC.json`, or called inside a launcher's world.

The run is a real one: `Run`, its data path, engine, recorder and checkpoints. After the warm-up come timed steps, then
steps with timed phases, then one commit. Results are written after each of the three, so the earlier figures survive if
a later part fails or is interrupted.
"""

import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft_dist.bench.spec import Spec
from ft_dist.config import RunConfig
from ft_dist.errors import EXIT_FINISHED, EXIT_USER, UserError
from ft_dist.run_folder import RunFolder

if TYPE_CHECKING:
    from ft_dist.run.run import Run


def main(argv: list[str] | None = None) -> int:
    from ft_dist.observe.streams import secure_streams
    from ft_dist.train import report_error

    arguments = sys.argv[1:] if argv is None else argv
    secure_streams()
    try:
        measure(Spec.read(Path(arguments[0])))
    except UserError as error:
        report_error(error)
        return EXIT_USER
    return EXIT_FINISHED


def measure(spec: Spec) -> dict[str, Any]:
    """This rank's results; rank 0 also writes them to `spec.result`. Raises UserError."""
    from ft_dist.model.quiet import quiet_process

    quiet_process()
    from ft_dist.run.warm_memory import touch_planned

    config = spec.config()
    free_memory = touch_planned(config)
    from ft_dist.bench.phases import Phases
    from ft_dist.preemption.stop import StopRequest
    from ft_dist.train import take_step

    stop = StopRequest()
    run = prepare(spec, config, stop, free_memory)
    lengths = _Lengths()
    phases: Any = None
    by_phase: list[dict[str, float]] = []
    last = spec.warmup + spec.steps + spec.phase_steps
    try:
        for batch in run.batches():
            lengths.add(batch)
            if run.step == spec.warmup + spec.steps:
                _write(spec, run, _figures(spec, run, lengths, by_phase))
                run.clock.lap()  # writing is not waiting for data
                phases = Phases(run.engine)
            if phases is None:
                take_step(run, stop, batch)
            else:
                with phases.communication():
                    take_step(run, stop, batch)
                by_phase.append(phases.taken())
            if run.step == last:
                break
        result = _figures(spec, run, lengths, by_phase)
        _write(spec, run, result)
        if spec.checkpoint:
            result |= _commit(run)
            _write(spec, run, result)
    finally:
        run.close()
    return result


def _write(spec: Spec, run: "Run", result: dict[str, Any]) -> None:
    """Rank 0 writes the result atomically."""
    if run.world.is_main:
        written = Path(f"{spec.result}.new")
        written.write_text(json.dumps(result), encoding="utf-8")
        written.replace(spec.result)


def prepare(spec: Spec, config: RunConfig, stop: Any, free_memory: Callable[[], None]) -> "Run":
    """The run that `ft-dist train` would build; with synthetic samples it needs no tokenizer or weights."""
    from ft_dist.run.start import prepare_run

    if not spec.synthetic:
        return prepare_run(config, stop, free_memory=free_memory)
    import os

    from ft_dist.bench.synthetic import SyntheticStore, VocabularyOnly
    from ft_dist.data.stream.mixture import MixtureSource
    from ft_dist.data.stream.stream import DataStream
    from ft_dist.engine.build import build_engine
    from ft_dist.model.load import load_model, random_model
    from ft_dist.observe.recorder import log_rank_output
    from ft_dist.preflight.ranks import form_world, meet
    from ft_dist.run.run import Run

    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    log_file = log_rank_output(config, rank=rank)
    world, _ = form_world(config, meet(config), rank=rank, size=size)
    free_memory()
    shape = json.loads((Path(config.model.path) / "config.json").read_text(encoding="utf-8"))
    vocabulary = int(shape.get("text_config", shape)["vocab_size"])
    tokenizer = VocabularyOnly(vocabulary)
    load = random_model if spec.random_weights else load_model
    engine = build_engine(config, world, folder=config.model.path, tokenizer=tokenizer, load=load)
    store = SyntheticStore(
        max_length=config.data.max_length,
        median=spec.median_length,
        labelled=spec.labelled,
        vocabulary=vocabulary,
        seed=config.seed,
    )
    stream = DataStream(
        [MixtureSource("synthetic", store)],
        seed=config.seed,
        global_rows=config.batch.global_rows,
        max_length=config.data.max_length,
        packing=config.data.packs,
    )
    run = Run(config, world, engine, stream, stop, tokenizer=tokenizer, held_out=None, folder=config.model.path)
    run.recorder.watch(log_file)
    run.start(facts=[], data_report={})
    return run


def _commit(run: "Run") -> dict[str, float]:
    """How long a save stalls training, and how long it takes to reach the disk."""
    started = time.perf_counter()
    run.clock.lap()
    run.commit()
    stall_s = time.perf_counter() - started
    run.finish_commits()
    return {"checkpoint_stall_s": stall_s, "checkpoint_s": time.perf_counter() - started}


class _Lengths:
    """Tokens, and (query, key) pairs of causal attention, over all samples of this rank."""

    def __init__(self) -> None:
        self.tokens = 0
        self.pairs = 0

    def add(self, batch: Any) -> None:
        for micro in batch.micro_batches:
            self.tokens += micro.real_tokens
            # padding has position 0; a sample's token at position p attends to p + 1 tokens
            self.pairs += int(micro.position_ids.sum()) + micro.real_tokens

    @property
    def context(self) -> float:
        """Mean number of tokens that a token attends to."""
        return self.pairs / max(1, self.tokens)


def _figures(spec: Spec, run: "Run", lengths: _Lengths, by_phase: list[dict[str, float]]) -> dict[str, Any]:
    import torch

    from ft_dist.distributed import max_over_ranks
    from ft_dist.resources import peak_memory_bytes, versions
    from ft_dist.run.step_record import device_peak_flops

    engine, world = run.engine, run.world
    model = engine.objective.causal_lm.config.get_text_config()
    head = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    # the rank that needs most
    peak_bytes = max_over_ranks(float(peak_memory_bytes(world.device)), world)
    return {
        "records": _records(run),
        "phases": by_phase,
        "parameters": engine.total_parameters,
        "trainable_share": engine.trainable_share,
        "attention_width": model.num_hidden_layers * model.num_attention_heads * head,
        "context": lengths.context,
        "world_size": world.size,
        "zero_stage": engine.stage,
        "kernels": engine.kernels,
        "peak_bytes": int(peak_bytes),
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
        "peak_flops": device_peak_flops(world.device) or _matmul_flops(run.config.model.dtype),
        "peak_flops_measured": device_peak_flops(world.device) is None,
        "versions": versions(),
    }


def _records(run: "Run") -> list[dict[str, Any]]:
    if not run.world.is_main:
        return []
    lines = RunFolder(run.config.run_dir).metrics.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@functools.cache
def _matmul_flops(dtype: str) -> float:
    """FLOP/s of one large matrix product with this process's threads: the peak for utilisation if no data sheet
    gives one."""
    import torch

    size, best = 1024, float("inf")
    a, b = (torch.randn(size, size).to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]) for _ in range(2))
    for _ in range(5):
        started = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


if __name__ == "__main__":
    sys.exit(main())
