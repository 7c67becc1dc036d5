"""Score a finished run, an adapter or any model on held-out files, in one process."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ft_dist.config.schema import DataConfig, RunConfig, SourceConfig
from ft_dist.errors import ConfigError
from ft_dist.evaluate.comparison import one_line
from ft_dist.evaluate.score import Scores
from ft_dist.model.builtin import Progress
from ft_dist.outside import expand_home

if TYPE_CHECKING:
    from ft_dist.checkpoint.find import Step
    from ft_dist.result.load import Finished

DEFAULT_MAX_LENGTH = 2048


def evaluate_path(
    path: str,
    sources: Sequence[str],
    *,
    step: "Step | None" = None,
    max_new_tokens: int = 32,
    max_samples: int | None = None,
    batch_rows: int = 8,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Scores:
    """Loss, and accuracy if samples end with an assistant turn, of `path` (see `trained_weights`) on `sources`.

    Without sources it uses the run's `data.eval`. `max_samples` limits it to the first ones. `progress` receives status
    lines. Raises ConfigError if there is nothing to score on, DataError, ModelError.
    """
    from ft_dist.result.load import load_for_inference, trained_weights

    say = progress or _quiet
    with trained_weights(path, step=step, trust_remote_code=trust_remote_code, progress=say) as weights:
        data = _held_out(path, weights.config, sources)
        finished = load_for_inference(weights)
    for note in finished.notes:
        say(note)
    return _score(finished, data, path, max_new_tokens, max_samples, batch_rows, say)


def table(scores: Scores) -> str:
    """The scores as text, with a few answers."""
    lines = [
        f"loss {scores.loss:.4f}   perplexity {scores.perplexity:.2f}   ({scores.labelled_tokens} labelled tokens)"
    ]
    if scores.accuracy is not None:
        lines.append(f"accuracy {scores.accuracy:.1%} of {scores.answered} answers")
        for example in scores.examples:
            mark = "correct" if example.correct else f"wrong, expected {one_line(example.reference, 30)}"
            lines.append(f"  {one_line(example.prompt, 60)}  ->  {one_line(example.answer, 40)}  ({mark})")
    return "\n".join(lines)


def _held_out(path: str, config: RunConfig | None, sources: Sequence[str]) -> DataConfig:
    max_length = config.data.max_length if config else DEFAULT_MAX_LENGTH
    chosen = [_source(source) for source in sources] or (list(config.data.eval) if config else [])
    if not chosen and config is None and not expand_home(path, error=ConfigError).is_dir():
        raise ConfigError(
            f"{path}: no such run folder, so there is no data.eval to score on. Check the path, or pass --data FILE to "
            "score a model of that name."
        )
    if not chosen:
        raise ConfigError(f"{path}: nothing to score on. Pass --data FILE, or name data.eval in the run's config.")
    cache_dir = config.data.cache_dir if config else None
    return DataConfig.model_validate(
        {"train": chosen, "eval": chosen, "max_length": max_length, "cache_dir": cache_dir}
    )


def _source(path: str) -> SourceConfig:
    try:
        return SourceConfig.model_validate({"path": path})
    except ValidationError as error:
        rule = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise ConfigError(f"--data: {rule}.") from None


def _score(
    finished: "Finished",
    data: DataConfig,
    path: str,
    max_new_tokens: int,
    max_samples: int | None,
    rows: int,
    say: Progress,
) -> Scores:
    from itertools import chain, islice

    from ft_dist.data.prepare.build import prepare
    from ft_dist.data.read.formats import read_samples
    from ft_dist.data.stream.batch import MicroBatch, collate
    from ft_dist.evaluate.score import held_out_loss, labelled_prompts, score_answers
    from ft_dist.model.anatomy.rotary import depends_on_longest
    from ft_dist.objective.table import build_objective

    model, tokenizer = finished.model, finished.tokenizer
    store = prepare(data.eval, tokenizer, data=data, model_path=path).store
    count = min(len(store), max_samples or len(store))
    say(f"scoring {count} samples")
    rows = 1 if depends_on_longest(model, data.max_length) else rows
    objective = build_objective(model)
    options = {"pad_id": tokenizer.pad_token_id, "gpu_length": data.max_length if model.device.type == "cuda" else None}
    batches = (
        collate([[sample] for sample in range(start, min(start + rows, count))], store, **options)
        for start in range(0, count, rows)
    )

    def summed(batch: MicroBatch) -> tuple[Any, int]:
        return objective.loss(batch.to(model.device)), objective.weight(batch)

    loss, labelled_tokens = held_out_loss(summed, batches)
    samples = islice(chain.from_iterable(read_samples(source) for source in data.eval), max_samples)
    answered = score_answers(
        model,
        labelled_prompts(samples, tokenizer),
        tokenizer=tokenizer,
        max_new_tokens=max_new_tokens,
        batch_rows=rows,
        device=model.device,
        progress=lambda done, whole: say(f"answered {done} of {whole}"),
    )
    return Scores(loss, labelled_tokens, answered.accuracy, answered.answered, answered.examples)


def _quiet(line: str) -> None:
    """The default: no progress lines."""
