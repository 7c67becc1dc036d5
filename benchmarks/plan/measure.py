"""`python -m benchmarks.plan.measure`: trains 8 settings on this machine's GPU and compares them with their plans.

A model with the widths of Llama 3 8B and a quarter of its blocks (random weights, made on the spot) takes a few steps
of each setting; each run's summary.json holds planned and real peak memory and step time. Meant for a GPU: on CPU only
memory can be compared.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# method, stage, checkpointing, kernels, rows per micro-batch
SETTINGS = [
    ("lora", 2, False, "auto", 1),
    ("lora", 2, False, "auto", 4),
    ("lora", 2, True, "auto", 8),
    ("lora", 2, False, "off", 1),
    ("lora", 3, True, "auto", 4),
    ("full", 1, True, "auto", 2),
    ("full", 2, False, "auto", 1),
    ("full", 3, True, "auto", 4),
]
LENGTH, STEPS = 4096, 6
SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan.measure")
    parser.add_argument("--json")
    parser.add_argument("--tiny", action="store_true", help="tiny-llama instead of the wide model, to try the script")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = "tiny-llama" if options.tiny else str(make_model(work / "model"))
        data = work / "text.jsonl"
        data.write_text(json.dumps({"text": "a quick brown fox jumps over the lazy dog " * 60_000}) + "\n")
        for setting in SETTINGS:
            rows.append(measured(setting, model, data, work / f"run{len(rows)}"))
            print(line(rows[-1]), flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=2) + "\n")
    return int(any("failed" in row for row in rows))


def make_model(folder: Path) -> Path:
    """Random bf16 weights with the byte tokenizer of the tiny models."""
    import torch
    import transformers

    from ft_dist.model.tiny import byte_tokenizer

    tokenizer = byte_tokenizer()
    config = transformers.LlamaConfig(**SHAPE, vocab_size=128256, max_position_embeddings=8192)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def measured(setting: tuple[Any, ...], model: str, data: Path, run: Path) -> dict[str, Any]:
    method, stage, checkpointing, kernels, micro_rows = setting
    overrides = {
        "model.path": model,
        "model.kernels": kernels,
        "method.kind": method,
        "engine.zero_stage": stage,
        "engine.activation_checkpointing": str(checkpointing).lower(),
        "batch.micro_rows": micro_rows,
        "batch.global_rows": 2 * micro_rows,
        "data.train": data,
        "data.eval": "[]",
        "data.packing": "false",
        "data.max_length": LENGTH,
        "optim.max_steps": STEPS,
        "checkpoint.interval_steps": 0,
        "output_dir": run,
    }
    command = [sys.executable, "-W", "ignore", "-m", "ft_dist.train", "smoke"]
    command += [f"{key}={value}" for key, value in overrides.items()]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, check=False)
    row = dict(zip(("method", "stage", "checkpointing", "kernels", "micro_rows"), setting, strict=True))
    if done.returncode != 0:
        return row | {"failed": done.stderr[-1500:]}
    summary = json.loads((run / "summary.json").read_text())
    keys = ("planned_peak_bytes", "peak_memory_bytes", "planned_step_s", "step_s")
    row |= {key: summary[key] for key in keys}
    row["memory_error"] = summary["planned_peak_bytes"] / summary["peak_memory_bytes"] - 1
    planned = summary["planned_step_s"]
    row["time_error"] = None if planned is None else planned / summary["step_s"] - 1
    return row


def line(row: dict[str, Any]) -> str:
    name = (
        f"{row['method']:5} ZeRO {row['stage']} rows {row['micro_rows']} kernels {row['kernels']:5}"
        f"{'checkpointing' if row['checkpointing'] else '':14}"
    )
    if "failed" in row:
        return f"{name} FAILED: {row['failed'].strip().splitlines()[-1]}"
    time = "" if row["time_error"] is None else f"  step {row['step_s']:.3f} s, planned {row['time_error']:+.1%}"
    return f"{name} peak {row['peak_memory_bytes'] / 2**30:6.2f} GiB, planned {row['memory_error']:+.1%}{time}"


if __name__ == "__main__":
    sys.exit(main())
