"""What `python -m benchmarks.kernels.resources` compiles ahead of time, with no GPU, for every chip.

Every module with kernels exposes `aot_cases(chip)`: the kernels and configurations that it would launch on that chip.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

Chip = Literal["sm_80", "sm_90", "sm_100", "gfx942"]
CHIPS: tuple[Chip, ...] = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class AotCase:
    """One kernel in one configuration.

    `signature` names a Triton type for every argument in order ("*bf16", "i64", "constexpr"); `constexprs` gives the
    values of the "constexpr" ones; `divisible` lists the arguments known to be multiples of 16 (leaving these out
    removes cp.async and adds spills that the real launch does not have).
    """

    name: str
    kernel: Callable[..., Any]
    signature: dict[str, str]
    constexprs: dict[str, Any]
    divisible: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
