"""Merged exports answer like the adapter, load without ft_dist, and are complete or absent."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ft_dist.config.load import dump_config, validate
from ft_dist.errors import ModelError
from ft_dist.evaluate.answers import answer_prompts
from ft_dist.model.builtin import resolve_model
from ft_dist.model.load import grow_embeddings
from ft_dist.model.parts.layers import layers_of
from ft_dist.model.tokenizer import load_tokenizer
from ft_dist.result.export import export_run
from ft_dist.result.load import find_weights, load_finished, load_weights


def finished_run(folder: Path, model: str, *, dtype: str = "fp32", kind: str = "lora", **lora: Any) -> Path:
    """A run folder as after training, with a random adapter instead of a trained one."""
    new_tokens = lora.pop("new_tokens", [])
    tree = {
        "model": {"path": model, "dtype": dtype, "new_tokens": new_tokens},
        "method": {"kind": kind} if kind == "full" else {"kind": kind, "rank": 8, "alpha": 16, **lora},
        "data": {"train": ["train.jsonl"]},
        "output_dir": str(folder),
    }
    folder.mkdir(parents=True)
    config = validate(tree)
    (folder / "config.yaml").write_text(dump_config(config))
    torch.manual_seed(0)
    base_folder = resolve_model(model)
    base = AutoModelForCausalLM.from_pretrained(
        base_folder, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    )
    tokenizer, _ = load_tokenizer(base_folder, new_tokens=new_tokens)
    grow_embeddings(base, len(tokenizer))
    if kind != "full":
        new_ids = tokenizer.convert_tokens_to_ids(new_tokens)
        base = config.method.adapt(base, layers_of(base), new_token_ids=new_ids)
        for name, parameter in base.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.data.normal_(std=0.08)
    base.save_pretrained(folder / "final")
    tokenizer.save_pretrained(folder / "final")
    return folder


def prompts(tokenizer: Any, count: int) -> list[list[int]]:
    texts = [f"E-mail {number}: {'please ' * (number % 7)}send {number * 37} lamps" for number in range(count)]
    turns = [[{"role": "user", "content": text}] for text in texts]
    return [tokenizer.apply_chat_template(t, add_generation_prompt=True, return_dict=True)["input_ids"] for t in turns]


def answers(model: Any, tokenizer: Any, rows: list[list[int]]) -> list[str]:
    return answer_prompts(model, rows, tokenizer=tokenizer, max_new_tokens=12, batch_rows=25, device="cpu")


CASES = {
    "llama": ("tiny-llama", {}),
    "llama-rslora": ("tiny-llama", {"rslora": True}),
    "llama-dora": ("tiny-llama", {"dora": True}),
    "gemma2-tied": ("tiny-gemma2", {}),
    "qwen3": ("tiny-qwen3", {}),
    "phi3-fused": ("tiny-phi3", {"target_modules": ["qkv_proj", "down_proj"]}),
    "tied-head": ("tiny-smollm", {"target_modules": ["q_proj", "lm_head"]}),
    "new-tokens": ("tiny-llama", {"new_tokens": ["<call>", "</call>"]}),
    "new-tokens-tied": ("tiny-smollm", {"new_tokens": ["<call>"]}),
    "new-tokens-head": ("tiny-llama", {"new_tokens": ["<call>"], "target_modules": ["q_proj", "lm_head"]}),
    "new-tokens-tied-head": ("tiny-smollm", {"new_tokens": ["<call>"], "target_modules": ["q_proj", "lm_head"]}),
    "whole-head": ("tiny-llama", {"new_tokens": ["<call>"], "modules_to_save": ["lm_head", "input_layernorm"]}),
    "whole-tied-head": ("tiny-smollm", {"modules_to_save": ["lm_head"]}),
    "whole-tied-ends": ("tiny-smollm", {"new_tokens": ["<call>"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    "some-layers": ("tiny-qwen3", {"layers_to_transform": [1], "exclude_modules": ["mlp", "k_proj"]}),
}
UNTIED = ("tied-head", "new-tokens-tied-head", "whole-tied-head", "whole-tied-ends")


@pytest.mark.parametrize("case", CASES)
def test_merged_model_answers_like_the_adapter(tmp_path: Path, case: str) -> None:
    model, lora = CASES[case]
    run = finished_run(tmp_path / "run", model, **dict(lora))
    export_run(run, kind="merged", to=tmp_path / "merged")
    adapter = load_finished(str(run), device="cpu")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    rows = prompts(tokenizer, 50)
    assert answers(merged, tokenizer, rows) == answers(adapter.model, adapter.tokenizer, rows)
    ids = torch.tensor([rows[3]])
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapter.model(ids).logits, rtol=1e-4, atol=1e-4)
    assert merged.dtype == torch.float32
    assert merged.config.tie_word_embeddings == (model in ("tiny-gemma2", "tiny-smollm") and case not in UNTIED)


def test_adapter_changes_something(tmp_path: Path) -> None:
    """Otherwise the test above would compare the base with itself."""
    run = finished_run(tmp_path / "run", "tiny-llama")
    adapter, base = load_finished(str(run), device="cpu"), load_finished("tiny-llama", device="cpu")
    ids = torch.tensor(prompts(base.tokenizer, 1))
    with torch.no_grad():
        assert (adapter.model(ids).logits - base.model(ids).logits).abs().mean() > 0.05


def test_bf16_merge_rounds_once(tmp_path: Path) -> None:
    """The merged weights equal base plus update in fp32, rounded once, bit for bit; bf16 has nothing closer.

    In bf16, the merged model is then no further from the fp32 truth than the adapter model, and the two
    differ by less than a unit in the last place (8 bits) of the largest logit, root mean square. Single logits of this
    random model, hotter than a trained one, are up to three units apart.
    """
    run = finished_run(tmp_path / "run", "tiny-llama", dtype="bf16")
    export_run(run, kind="merged", to=tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    adapter = load_finished(str(run), device="cpu")
    assert merged.dtype == adapter.model.dtype == torch.bfloat16
    loaded = load_weights(find_weights(str(run)), dtype=torch.bfloat16, vocabulary=len(adapter.tokenizer))
    exact = loaded.eval().float()  # of the base as training saw it
    ids = torch.tensor(prompts(adapter.tokenizer, 1))
    with torch.no_grad():
        truth, ours, theirs = (model(ids).logits.float() for model in (exact, merged, adapter.model))
    layer = exact.base_model.model.model.layers[0].self_attn.q_proj
    update = 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    whole = (layer.base_layer.weight + update).to(torch.bfloat16)
    assert torch.equal(merged.model.layers[0].self_attn.q_proj.weight, whole)
    assert (ours - truth).square().mean() <= 1.1 * (theirs - truth).square().mean()
    assert (ours - theirs).square().mean().sqrt() <= 2.0**-7 * truth.abs().max()


def test_the_export_has_the_stop_tokens(tmp_path: Path) -> None:
    export_run(finished_run(tmp_path / "run", "tiny-qwen3"), kind="merged", to=tmp_path / "merged")
    tree = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tree["eos_token_id"] == tokenizer.eos_token_id
    assert tree["pad_token_id"] == tokenizer.pad_token_id
    assert json.loads((tmp_path / "merged" / "config.json").read_text()).get("use_cache", True)


def test_exports_load_without_ft_dist(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", "tiny-llama")
    export_run(run, kind="merged", to=tmp_path / "merged")
    export_run(run, kind="adapter", to=tmp_path / "adapter")
    code = (
        "import sys; sys.modules['ft_dist'] = None\n"
        "from peft import AutoPeftModelForCausalLM as P\n"
        "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T\n"
        "for kind, folder in ((M, sys.argv[1]), (P, sys.argv[2])):\n"
        "    model, tokenizer = kind.from_pretrained(folder), T.from_pretrained(folder)\n"
        "    model.generate(**tokenizer('Hello', return_tensors='pt'), max_new_tokens=2)\n"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "merged"), str(tmp_path / "adapter")]
    subprocess.run(arguments, check=True, cwd=tmp_path, capture_output=True)


def test_full_runs_are_copied(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", "tiny-llama", kind="full")
    assert find_weights(str(run)).base is None
    export_run(run, kind="merged", to=tmp_path / "merged")
    assert (tmp_path / "merged/model.safetensors").read_bytes() == (run / "final/model.safetensors").read_bytes()
    with pytest.raises(ModelError, match="no adapter"):
        export_run(run, kind="adapter", to=tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_missing_runs_and_existing_folders_are_refused(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", "tiny-llama")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("keep me")
    with pytest.raises(ModelError, match="not an empty folder"):
        export_run(run, kind="merged", to=taken)
    assert [path.name for path in taken.iterdir()] == ["mine.txt"]
    with pytest.raises(ModelError, match="no such folder"):
        export_run(tmp_path / "absent", kind="merged", to=tmp_path / "out")
    (run / "final").rename(run / "elsewhere")
    with pytest.raises(ModelError, match="has not finished"):
        export_run(run, kind="merged", to=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failed_export_leaves_nothing(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", "tiny-llama")
    weights = run / "final" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot be loaded"):
        export_run(run, kind="merged", to=tmp_path / "deep" / "out")
    assert list((tmp_path / "deep").iterdir()) == []
