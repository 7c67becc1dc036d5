"""What `ft-dist check` finds out about the model with the code that loads, adapts and checks it in a run."""

from ft_dist.config import RunConfig
from ft_dist.distributed import join_world, leave_world, open_store
from ft_dist.engine.build import build_engine
from ft_dist.model.builtin import resolve_model
from ft_dist.model.load import enable_activation_checkpointing, load_model
from ft_dist.model.parts.layers import layers_of
from ft_dist.model.quiet import quietly
from ft_dist.model.tokenizer import configured_tokenizer, new_token_ids
from ft_dist.run.proof.self_check import self_check


def check_model(config: RunConfig, *, weights: bool) -> list[str]:
    """Load names and shapes of the weights, and adapt the model to the method; returns lines for the console.

    `weights` also loads the weights, in this process, and checks the model's loss, isolation and gradients. Raises
    ModelError as a run would.
    """
    folder = resolve_model(config.model.path)
    tokenizer, _ = configured_tokenizer(config.model, folder)
    with quietly():
        causal_lm, left_out = load_model(config.model, folder=folder, vocabulary=len(tokenizer), meta=True)
        if config.engine.activation_checkpointing:
            enable_activation_checkpointing(causal_lm)
        layers = layers_of(causal_lm)
        config.method.adapt(causal_lm, layers, new_token_ids=new_token_ids(config.model, tokenizer))
    if not weights:
        return left_out
    world = join_world(open_store(timeout_s=config.engine.timeout_s), timeout_s=config.engine.timeout_s)
    try:
        engine = build_engine(config, world, folder=folder, tokenizer=tokenizer)
        checked = self_check(engine, config, folder=folder, tokenizer=tokenizer, samples=None)
    finally:
        leave_world()
    return [*left_out, engine.kernels, *checked.lines]
