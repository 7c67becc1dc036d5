"""Hugging Face and DeepSpeed speak a lot while they load and save; none of it is something a user can act on."""

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Inside, transformers reports errors only and draws no progress bars; the previous settings come back after."""
    import torch
    from transformers.utils import logging

    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    # transformers imports DeepSpeed when it saves, and DeepSpeed warns when it finds no accelerator. Naming the CPU
    # where it is the only device picks the same one silently.
    name_cpu = "DS_ACCELERATOR" not in os.environ and not torch.accelerator.is_available()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if name_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        yield
    finally:
        if name_cpu:
            os.environ.pop("DS_ACCELERATOR", None)
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()
