"""`tune run` of its single-device recipes, for models of the Llama architecture."""

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.peers.case import Case, Command, Peer, Step

ROOT = Path(__file__).resolve().parents[3]
_LINE = re.compile(r"Step (\d+) \| .*?loss:([-+.\deE]+)")
_ATTENTION = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "o_proj": "output_proj"}


def command(case: Case, folder: Path, binaries: Path) -> Command:
    ours = "benchmarks.peers.torchtune.parts"
    settings: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "model": model(case),
        "tokenizer": {
            "_component_": f"{ours}.chat_tokenizer",
            "path": str(case.model / "tokenizer.json"),
            # the length of a packed row; samples are shorter
            "max_seq_len": case.packed_length if case.packed else case.max_length,
        },
        "checkpointer": {
            "_component_": "torchtune.training.FullModelHFCheckpointer",
            "checkpoint_dir": str(case.model),
            "checkpoint_files": ["model.safetensors"],
            "recipe_checkpoint": None,
            "output_dir": str(folder / "out"),
            "model_type": "LLAMA3_2",
        },
        "resume_from_checkpoint": False,
        "save_adapter_weights_only": True,
        "dataset": {
            "_component_": "torchtune.datasets.chat_dataset",
            "source": "json",
            "data_files": str(case.ordered),
            "conversation_column": "messages",
            "conversation_style": "openai",
            "train_on_input": False,
            "packed": case.packed,
            "split": "train",
        },
        "seed": case.seed,
        "shuffle": False,
        "batch_size": 1 if case.packed else case.rows,
        "optimizer": {
            "_component_": "torch.optim.AdamW",
            "fused": True,
            "weight_decay": 0.0,
            "lr": case.learning_rate,
        },
        "lr_scheduler": {"_component_": f"{ours}.constant_rate"},
        "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
        "epochs": 1,
        "max_steps_per_epoch": None,
        "gradient_accumulation_steps": 1,
        "optimizer_in_bwd": False,
        "clip_grad_norm": 1.0,
        "compile": False,
        "metric_logger": {"_component_": "torchtune.training.metric_logging.StdoutLogger"},
        "log_every_n_steps": 1,
        "log_peak_memory_stats": False,
        "device": case.device,
        "dtype": case.dtype,
        "enable_activation_checkpointing": False,
        "enable_activation_offloading": False,
    }
    (folder / "config.yaml").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    recipe = f"{case.method}_finetune_single_device"
    return Command(
        [str(binaries / "tune"), "run", recipe, "--config", str(folder / "config.yaml")], {"PYTHONPATH": str(ROOT)}
    )


def model(case: Case) -> dict[str, Any]:
    """The shape from config.json. Raises LookupError for another architecture."""
    config = json.loads((case.model / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != "llama":
        raise LookupError(f"torchtune is set up here for Llama shapes only, not {config['model_type']}")
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10000.0)}
    shape = {
        "vocab_size": config["vocab_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "num_kv_heads": config["num_key_value_heads"],
        "embed_dim": config["hidden_size"],
        "intermediate_dim": config["intermediate_size"],
        "max_seq_len": config["max_position_embeddings"],
        "norm_eps": config["rms_norm_eps"],
        "rope_base": int(rope["rope_theta"]),
        # Llama 3's position scaling, switched off
        "scale_factor": 1,
    }
    if case.method == "full":
        return {"_component_": "torchtune.models.llama3_2.llama3_2", **shape}
    return {
        "_component_": "torchtune.models.llama3_2.lora_llama3_2",
        **shape,
        "lora_attn_modules": [_ATTENTION[name] for name in case.targets if name in _ATTENTION],
        "apply_lora_to_mlp": "up_proj" in case.targets,
        "lora_rank": case.rank,
        "lora_alpha": case.alpha,
        "lora_dropout": 0.0,
    }


def step_of(line: str, seen: int) -> Step | None:
    """`Step 3 | loss:2.345 lr:0.0001 tokens_per_second_per_gpu:310.2`"""
    found = _LINE.search(line)
    return Step(int(found.group(1)), float(found.group(2))) if found else None


PEER = Peer(
    name="torchtune", command=command, step_of=step_of, packs=True, note="packed: rows of several samples, block mask"
)
