"""Opens safetensors files so that errors of the system are OSErrors with their errno."""

import os
import re
from pathlib import Path
from typing import Any

from safetensors import safe_open


def open_tensor_file(path: Path, *, framework: str = "pt") -> Any:
    """The handle of `safe_open`. Raises OSError, and SafetensorError if it is not a safetensors file.

    The library calls every file that it cannot open missing, puts the errno of a failed mapping into the text only, and
    lets torch, which maps the file once more, raise a RuntimeError.
    """
    with path.open("rb"):
        pass
    try:
        return safe_open(path, framework=framework)
    except (OSError, RuntimeError) as error:
        number = re.search(r"\((?:os error )?(\d+)\)$", str(error), re.MULTILINE)
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
