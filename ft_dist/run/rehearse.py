"""Everything that can be checked ahead of a run: what `train` refuses, `ft-dist check` refuses with the same words."""

from ft_dist.check import check
from ft_dist.config import RunConfig
from ft_dist.distributed import join_world, leave_world, open_store
from ft_dist.engine.build import build_engine
from ft_dist.model.builtin import resolve_model
from ft_dist.model.load import load_model
from ft_dist.model.quiet import quietly
from ft_dist.model.tokenizer import configured_tokenizer, new_token_ids
from ft_dist.run.self_check import self_check


def rehearse(config: RunConfig, *, world_size: int, model: bool = False) -> list[str]:
    """The facts of `check`, and of loading the tokenizer, the weights' names and shapes, and the method's adapters.

    `model` also loads the weights in this process, and checks the model's loss, isolation and gradients as a run does.
    Raises the first UserError found.
    """
    facts = check(config, world_size=world_size)
    folder = resolve_model(config.model.path)
    tokenizer, notes = configured_tokenizer(config.model, folder)
    with quietly():
        causal_lm, left_out = load_model(config.model, folder=folder, vocabulary=len(tokenizer), meta=True)
        config.method.adapt(causal_lm, new_token_ids=new_token_ids(config.model, tokenizer))
    facts += [*notes, *left_out]
    if not model:
        return facts
    world = join_world(open_store(timeout_s=config.engine.timeout_s), timeout_s=config.engine.timeout_s)
    try:
        engine = build_engine(config, world, folder=folder, tokenizer=tokenizer)
        checked = self_check(engine, config, folder=folder, tokenizer=tokenizer, store=None)
    finally:
        leave_world()
    return [*facts, engine.kernels, *checked.lines]
