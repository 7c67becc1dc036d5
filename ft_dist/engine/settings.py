"""DeepSpeed's configuration from a `RunConfig`.

We handle accumulation, clipping and learning-rate schedules: DeepSpeed only receives the step boundaries and never
scales a loss.
"""

from typing import Any

from ft_dist.config.schema import RunConfig

REDUCE_BUCKET_ELEMENTS = 50_000_000
"""100 MB in bf16, enough to saturate a link; DeepSpeed's default of 500 million is allocated in full on every rank"""


WHOLE_GRADIENT_ELEMENTS = 1 << 28
"""Unsharded fp32 gradients that a rank may hold, 1 GiB, in exchange for fewer operations"""

PIECE_ELEMENTS = 1 << 26
"""Gradients that are concatenated before they are accumulated, 128 MiB in bf16"""


def effective_stage(config: RunConfig, ranks: int, *, trainable: int) -> int:
    """The ZeRO stage that DeepSpeed uses on `ranks` ranks with `trainable` parameters.

    "auto" is 0 for one rank in fp32, which has nothing to shard: a full step of SmolLM2-135M then takes an eighth less
    time, and 1 GB less memory. In bf16 it is 1, whose update does not loop over parameters (flat_update.py), for one
    rank and for gradients few enough to keep unsharded, such as those of adapters. Otherwise it is 2, and never 3.

    Stage 0 in bf16 runs as stage 1: DeepSpeed's stage 0 accumulates gradients in bf16, so a step would depend on how
    its batch is split. Stage 1 accumulates in fp32, moves the same bytes and needs less memory.
    """
    stage, dtype = config.engine.zero_stage, config.model.dtype
    if stage != "auto":
        return 1 if stage == 0 and dtype == "bf16" else stage
    if config.engine.offload != "none":
        return 2
    if dtype == "fp32":
        return 0 if ranks == 1 else 2
    return 1 if ranks == 1 or trainable <= WHOLE_GRADIENT_ELEMENTS else 2


def deepspeed_config(
    config: RunConfig, *, stage: int, device_type: str, trainable: int | None = None
) -> dict[str, Any]:
    """`stage` is the result of `effective_stage`.

    `trainable`: number of trainable parameters, if known, which bounds the buffers.
    """
    # the CPU-offload path accumulates in host buffers only if it expects more than one micro-batch
    accumulation = 2 if config.engine.offload != "none" else 1
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.batch.micro_rows,
        "gradient_accumulation_steps": accumulation,
        # stage 0 clips in ft_dist/engine/step.py, which also needs the norm to detect a non-finite step
        "gradient_clipping": config.optim.max_grad_norm if stage > 0 else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "wall_clock_breakdown": False,
        # it waits for the GPU before every forward
        "timers": {"throughput": {"enabled": False}},
        "steps_per_print": None,
        "zero_optimization": _zero(config, stage, device_type, trainable),
    }
    if config.model.dtype == "bf16":
        settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def reduce_bucket_elements(trainable: int) -> int:
    """Gradients reduced together; at most all of them."""
    return max(2, min(REDUCE_BUCKET_ELEMENTS, trainable + trainable % 2))


def _zero(config: RunConfig, stage: int, device_type: str, trainable: int | None) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage}
    if trainable is not None:
        zero["reduce_bucket_size"] = reduce_bucket_elements(trainable)
    if stage in (1, 2):
        zero |= {"overlap_comm": False, "contiguous_gradients": True}
    if stage == 3:
        zero |= {"stage3_gather_16bit_weights_on_model_save": False}
        if device_type == "cpu":
            # gloo runs on the cores that compute, and holds every bucket twice: prefetching is no faster there, and the
            # amount in flight, up to 3 x the weights, is unpredictable
            zero["stage3_prefetch_bucket_size"] = 0
    if config.engine.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    if config.engine.offload == "nvme":
        zero["offload_optimizer"] = {"device": "nvme", "nvme_path": config.engine.nvme_path, "pin_memory": False}
    return zero
