"""One contestant in its own process, so that its peak memory is its own; prints one line of JSON.

If the GPU is too small for a side, the side runs again with activation checkpointing, and its line records that.

`ours` runs the objective on our kernels, `hf` the same model with Hugging Face's forward and loss and peft's LoRA,
`liger` that with Liger's kernels, `unsloth` Unsloth's own model; all with torch's AdamW, the same rows, labels and
precision.
"""

import argparse
import gc
import json
import os
import resource
import shutil
import signal
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from typing import Any

import torch

import benchmarks.training  # noqa: F401
from benchmarks.rows import emit
from benchmarks.training.shapes import build

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # folders in memory are removed
    try:
        result = measure(options)
    except torch.OutOfMemoryError as error:
        if options.checkpointing or options.device == "cpu":
            raise
        print(f"{options.side} does not fit without activation checkpointing: {error}", flush=True)
        emit("side", side=options.side, checkpointing=False, failed=f"out of memory: {error}"[:500])
        options.checkpointing = True
        result = None
    if result is None:  # outside the handler, because its traceback keeps the tensors alive
        gc.collect()
        torch.cuda.empty_cache()
        result = measure(options)
    emit("side", **result)
    print(json.dumps(result))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The figures of this side. Raises torch.OutOfMemoryError."""
    if options.side == "unsloth":
        model = unsloth_model(options)
    else:
        model = plain_model(options)
        if options.side == "liger":
            from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

            _apply_liger_kernel_to_instance(model=model)
        model = with_adapters(model, options)
    forward = (
        our_forward(model, options)
        if options.side == "ours"
        else hugging_face_forward(model, packed=options.samples > 1)
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    batch = rows(options)
    resident = memory_now(options.device)
    losses, seconds = [], []
    for number in range(options.warmup + options.steps):
        started = now(options.device)
        loss = forward(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        took = now(options.device) - started
        emit("side step", side=options.side, number=number, step_s=took, loss=losses[-1])
        if number >= options.warmup:
            seconds.append(took)
    tokens = options.rows * options.tokens
    return {
        "side": options.side,
        "model": options.model,
        "method": options.method,
        "dtype": options.dtype,
        "rows": options.rows,
        "tokens": options.tokens,
        "samples": options.samples,
        "checkpointing": options.checkpointing,
        "step_s": statistics.median(seconds),
        "tokens_per_s": tokens / statistics.median(seconds),
        "peak_bytes": peak(options.device),
        "peak_above_weights_bytes": peak(options.device) - resident,
        "first_loss": losses[0],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "mfu": utilisation(model, options, tokens / statistics.median(seconds)),
    }


def plain_model(options: argparse.Namespace, *, layers: int | None = None) -> Any:
    """transformers' model of the shape, whole or with its first `layers` alone."""
    return build(options.model, dtype=DTYPES[options.dtype], device=options.device, layers=layers)


def with_adapters(model: Any, options: argparse.Namespace) -> Any:
    """Adds peft's LoRA and activation checkpointing as asked."""
    if options.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if options.method == "full":
        return model
    import peft

    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=options.rank, lora_alpha=32, target_modules="all-linear")
    return peft.get_peft_model(model, settings, autocast_adapter_dtype=False)


def unsloth_model(options: argparse.Namespace) -> Any:
    """The same weights, read from a folder as Unsloth expects."""
    from unsloth import FastLanguageModel  # before transformers, which it patches

    from ft_dist.model.tiny import byte_tokenizer

    plain = plain_model(options)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in plain.parameters())
    with tempfile.TemporaryDirectory(dir=_in_memory(weights)) as folder:
        plain.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        del plain
        torch.cuda.empty_cache()
        model, _ = FastLanguageModel.from_pretrained(
            folder,
            dtype=DTYPES[options.dtype],
            max_seq_length=options.tokens,
            load_in_4bit=False,
            full_finetuning=options.method == "full",
        )
    checkpointing = "unsloth" if options.checkpointing else False
    if options.method == "full":
        return model
    return FastLanguageModel.get_peft_model(
        model,
        r=options.rank,
        lora_alpha=32,
        lora_dropout=0.0,
        bias="none",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        use_gradient_checkpointing=checkpointing,
    )


def _in_memory(need_bytes: int) -> str | None:
    """An in-memory file system with twice the room, because a disk would take a minute for 16 GB of weights."""
    memory = "/dev/shm"
    return memory if os.path.isdir(memory) and shutil.disk_usage(memory).free > 2 * need_bytes else None


def utilisation(model: Any, options: argparse.Namespace, tokens_per_s: float) -> float | None:
    """Share of the chip's dense bf16 peak; None if no data sheet is known, as on CPU."""
    from ft_dist.resources import flops_per_token
    from ft_dist.run.step_record import device_peak_flops

    peak_rate = device_peak_flops(torch.device(options.device))
    if peak_rate is None:
        return None
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    config = model.config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_hidden_layers * config.num_attention_heads * head
    per_token = flops_per_token(total_parameters=total, trainable_share=trained / total)
    return tokens_per_s * (per_token + 12 * width * (options.tokens + 1) / 2) / peak_rate


def our_forward(model: Any, options: argparse.Namespace) -> Any:
    from ft_dist_kernels.attention.ragged_segments import segments_for

    from ft_dist.heap import keep_freed_memory
    from ft_dist.model.fused.fuse import fuse
    from ft_dist.objective.causal import CausalObjective

    if options.device == "cpu":
        keep_freed_memory()  # as `ft-dist train` does
    causal_lm = model.get_base_model() if options.method == "lora" else model
    report = fuse(causal_lm, kernels="auto", device_type=options.device, zero3=False)
    objective = CausalObjective(model, fused=report.head_backend, by_segment=report.segments)

    made = {name: tensor.cpu() for name, tensor in rows(options).items()}
    segments = segments_for(options.device, made["position_ids"]).to(options.device)
    kept = torch.arange(made["labels"].numel())
    labelled = kept[made["labels"].view(-1) != -100].to(options.device)
    kept = kept.to(options.device)

    def forward(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = objective(**batch, kept=kept, segments=segments, labelled=labelled)
        return loss / len(labelled)

    return forward


def hugging_face_forward(model: Any, *, packed: bool) -> Any:
    """Passes positions only if rows hold several samples: transformers then masks them apart; rows of one
    sample take its fast path, without a mask and without a copy of keys and values per query head."""

    def forward(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        # transformers shifts labels itself, so restore the first column that the shifted form lacks
        first = torch.full_like(batch["labels"][:, :1], -100)
        labels = torch.cat([first, batch["labels"][:, :-1]], dim=1)
        positions = {"position_ids": batch["position_ids"]} if packed else {}
        return model(input_ids=batch["input_ids"], labels=labels, **positions).loss

    return forward


def rows(options: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Random tokens, `samples` of different lengths in every row. The last `labelled` share of each has labels, except
    its very last token."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 400, (options.rows, options.tokens), generator=generator)
    labels = ids.roll(-1, dims=1)
    positions = torch.empty_like(ids)
    cuts = 1 + torch.randperm(options.tokens - 1, generator=generator)[: options.samples - 1]
    bounds = [0, *sorted(cuts.tolist()), options.tokens]
    for start, end in pairwise(bounds):
        positions[:, start:end] = torch.arange(end - start)
        labels[:, start : start + int((end - start) * (1 - options.labelled))] = -100
        labels[:, end - 1] = -100
    batch = {"input_ids": ids, "labels": labels, "position_ids": positions}
    return {name: tensor.to(options.device) for name, tensor in batch.items()}


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def memory_now(device: str) -> int:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def peak(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=["ours", "hf", "liger", "unsloth"])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--method", default="lora", choices=["lora", "full"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=1, help="samples in a row")
    parser.add_argument("--labelled", type=float, default=1.0, help="share of a sample that has labels")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--checkpointing", action="store_true")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
