"""Builds the engine from a config: loads the model, adapts it and passes it to DeepSpeed, in the order ZeRO-3 needs."""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ft_dist.config.schema import RunConfig
from ft_dist.distributed import World
from ft_dist.engine.fragments import hold_contents
from ft_dist.engine.settings import deepspeed_config
from ft_dist.engine.step import Engine, stage_of
from ft_dist.errors import ModelError
from ft_dist.model.anatomy.decoder import other_parameters
from ft_dist.model.fp8 import hold_base_in_fp8, refuse_without_fp8
from ft_dist.model.fused.fuse import fuse, register_parameters
from ft_dist.model.load import Loaded, enable_activation_checkpointing, load_model
from ft_dist.model.parts.layers import layers_of
from ft_dist.model.parts.new_tokens import run_token_rows
from ft_dist.model.parts.trained import trained_parts
from ft_dist.model.quiet import quietly
from ft_dist.model.tokenizer import new_token_ids
from ft_dist.objective.table import build_objective


def build_engine(
    config: RunConfig,
    world: World,
    *,
    folder: str,
    tokenizer: Any,
    load: Callable[..., Loaded] = load_model,
    trains: bool = True,
) -> Engine:
    """Load `folder`, adapt it to the method, wrap it in DeepSpeed. `load` takes what `load_model` does.

    Without `trains` it has no optimizer, and memory for little more than the weights.

    Raises ModelError.
    """
    if config.model.base_dtype == "fp8":
        refuse_without_fp8(config.model, world.device)
    zero3 = config.engine.zero_stage == 3
    prepare_deepspeed()
    settings = deepspeed_config(config, stage=3, device_type=world.device.type) if zero3 else None
    # new embedding rows and adapters are initialised randomly, with the same numbers on every rank
    torch.manual_seed(config.seed)
    with quietly():
        model: Any
        model, notes = load(config.model, folder=folder, vocabulary=len(tokenizer), zero3_settings=settings)
        if config.engine.activation_checkpointing:
            enable_activation_checkpointing(model)
        freeze_other_parts(model)
        never_trained = [parameter for parameter in model.parameters() if not parameter.requires_grad]
        layers = layers_of(model)
        with _whole_embeddings(model, zero3), _peft_gathers(zero3):
            model = config.method.adapt(model, layers, new_token_ids=new_token_ids(config.model, tokenizer))
        if trains:
            refuse_untrainable(model, config)
        if not zero3:
            model.to(world.device)
        causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
        if trains and stage_of(model, config, world) == 0 and world.device.type == "cpu":
            own_trained_weights(model)
        base_in_fp8 = hold_base_in_fp8(causal_lm) if config.model.base_dtype == "fp8" else None
        if zero3:
            _gather_adapted_parameters(causal_lm)
        run_token_rows(causal_lm, register_parameters if zero3 else None)
        report = fuse(causal_lm, kernels=config.model.kernels, device_type=world.device.type, zero3=zero3)
        objective = build_objective(model, fused=report.head_backend, by_segment=report.segments, zero3=zero3)
        report.add_head(objective.head.reason_unfused())
        engine = Engine(objective, config, world, fused=report, trains=trains)
        if trains:
            hold_contents(engine)
        engine.kernels = report.line() if base_in_fp8 is None else f"{report.line()}; {base_in_fp8.line()}"
        engine.notes = [*notes, *config.method.check(layers)]
        engine.parts = trained_parts(model)
        engine.never_trained = never_trained
        return engine


def refuse_untrainable(model: nn.Module, config: RunConfig) -> None:
    """Raise ModelError if the method trains no parameter, for which an optimizer cannot be built."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError(
            f"method.kind={config.method.kind}: leaves no parameter of model.path={config.model.path} to train, "
            "because the model loads frozen. Use method.kind=lora, or another model."
        )


def _whole_embeddings(model: Any, zero3: bool) -> Any:
    """Under ZeRO-3, gathers embedding and head inside: the rows of new tokens start as a copy of theirs."""
    import deepspeed

    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    parameters = {id(end.weight): end.weight for end in ends if end is not None and hasattr(end.weight, "ds_id")}
    return deepspeed.zero.GatheredParameters([*parameters.values()], modifier_rank=None, enabled=zero3)


@contextlib.contextmanager
def _peft_gathers(zero3: bool) -> Iterator[None]:
    """Under ZeRO-3, peft gathers each weight that it reads inside, such as those whose norms DoRA takes.

    peft itself looks for a global setting of transformers. With that setting, new tokens would also read their rows
    through CUDA, whatever the device.
    """
    from peft.utils import integrations

    original = integrations.check_deepspeed_zero3_enabled
    integrations.check_deepspeed_zero3_enabled = lambda: zero3
    try:
        yield
    finally:
        integrations.check_deepspeed_zero3_enabled = original


def _gather_adapted_parameters(causal_lm: nn.Module) -> None:
    """Have ZeRO-3 gather a layer whose parameter has an adapter as a whole, before its forward: peft then registers a
    parametrization, which moves the parameter past the hooks of the layer that holds it."""
    from deepspeed.utils import set_z3_leaf_module
    from peft.tuners.lora.layer import ParamWrapper

    for module in causal_lm.modules():
        if isinstance(module, ParamWrapper):
            set_z3_leaf_module(module, True)


def prepare_deepspeed() -> None:
    """Call once per process, after `join_world`."""
    _import_muon_uncompiled()
    _silence_memory_reports()
    _share_process_group()


def freeze_other_parts(causal_lm: Any) -> None:
    """Train the text model of a multimodal one alone: its other parts get no gradient, and weight decay would shrink
    them."""
    for parameter in other_parameters(causal_lm):
        parameter.requires_grad_(False)


def own_trained_weights(model: nn.Module) -> None:
    """Copy trained weights out of the memory-mapped checkpoint, which the first update would copy page by page.

    That took 1.2 s for SmolLM2-135M. Higher stages copy weights anyway; frozen weights stay mapped.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.clone()


def _share_process_group() -> None:
    """Make DeepSpeed use the existing process group; otherwise ZeRO-3 would load for a single rank.

    On CPU, DeepSpeed builds a shared-memory operator for inference, which training never calls and which needs a
    compiler. Setting the list of compatible operators here avoids DeepSpeed's compiler probes. Other accelerators do
    not have this operator.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is not None:
        vars(deepspeed.ops).setdefault("__compatible_ops__", {})[builder.NAME] = False
    deepspeed.init_distributed(verbose=False)


def _silence_memory_reports() -> None:
    """DeepSpeed's BF16_Optimizer collects garbage and reports memory around each group, whatever the settings: 0.7 s
    each time."""
    from deepspeed.runtime import bf16_optimizer

    bf16_optimizer.see_memory_usage = lambda *_, **__: None


def _import_muon_uncompiled() -> None:
    """Avoid importing torch's Inductor: 2.5 of the 13 s of processor time that imports take.

    DeepSpeed imports its Muon for any optimizer, which passes functions to `torch.compile` at import.
    """
    from deepspeed.runtime import compiler

    original = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = original
