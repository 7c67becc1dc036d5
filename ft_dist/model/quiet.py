"""Silences Hugging Face's and DeepSpeed's output while they load and save: users cannot act on any of it."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Inside, transformers reports only errors and shows no progress bars; the previous settings return afterwards."""
    import torch
    from transformers.utils import logging as hf_logging

    verbosity, had_bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    # transformers imports DeepSpeed when it saves, and DeepSpeed warns if it finds no accelerator. Naming the CPU,
    # where it is the only device, selects it silently.
    name_cpu = "DS_ACCELERATOR" not in os.environ and not torch.accelerator.is_available()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    if name_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        yield
    finally:
        if name_cpu:
            os.environ.pop("DS_ACCELERATOR", None)
        hf_logging.set_verbosity(verbosity)
        if had_bars:
            hf_logging.enable_progress_bar()


def quiet_process() -> None:
    """For a training process, before the libraries are imported: turns their start-up messages off permanently."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(torch|deepspeed|transformers|peft)\b")
