"""Hugging Face and DeepSpeed speak a lot while they load and save; none of it is something a user can act on."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Inside, transformers reports errors only and draws no progress bars; the previous settings come back after."""
    import torch
    from transformers.utils import logging as hf_logging

    verbosity, had_bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    # transformers imports DeepSpeed when it saves, and DeepSpeed warns when it finds no accelerator. Naming the CPU
    # where it is the only device picks the same one silently.
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
    """For a training process, before the libraries are imported: their start-up chatter stays off for good."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(torch|deepspeed|transformers|peft)\b")
