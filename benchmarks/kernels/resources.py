"""Registers, spills and shared memory of every kernel, compiled ahead of time for four chips; needs no GPU.

    python -m benchmarks.kernels.resources [--json FILE] [--ops OP ...] [--chips CHIP ...] [--quick]

Exits 1 if a kernel does not compile, takes more shared memory than its chip has, or spills registers. NVIDIA's
figures come from the cubin (`cuobjdump -res-usage`, carried by Triton), AMD's from the compiler's own metadata.
"""

import argparse
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import ft_dist_kernels
from ft_dist_kernels.aot import CHIPS, AotCase, Chip

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32)}
TARGETS["gfx942"] = ("hip", "gfx942", 64)  # type: ignore[assignment]
# The limit of one block: the architecture's opt-in maximum on NVIDIA, the LDS of a compute unit on AMD.
SHARED_BYTES = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}


@dataclass(frozen=True)
class Usage:
    """The resources that one kernel takes on one chip; `error` is empty if it compiled.

    `narrow_loads` counts the instructions that read less than 4 bytes per thread from memory, on NVIDIA: tiles
    read that way take many times as long.
    """

    op: str
    kernel: str
    chip: str
    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    warps: int = 0
    narrow_loads: int = 0
    error: str = ""

    def problem(self) -> str:
        if self.error:
            return f"does not compile: {self.error}"
        if self.shared_bytes > SHARED_BYTES[self.chip]:
            return f"takes {self.shared_bytes} bytes of shared memory; {self.chip} has {SHARED_BYTES[self.chip]}"
        if self.spill_bytes:
            return f"spills {self.spill_bytes} bytes of registers"
        return ""


@cache
def ops() -> dict[str, Any]:
    """Every `aot_cases` of the kernels, keyed by op: lora, lora.extended, cross_entropy, quantised.fp8, ..."""
    found = {}
    for info in pkgutil.walk_packages(ft_dist_kernels.__path__, "ft_dist_kernels."):
        module = importlib.import_module(info.name)
        cases = getattr(module, "aot_cases", None)
        if cases is not None and cases.__module__ == module.__name__:
            name = info.name.removeprefix("ft_dist_kernels.")
            found[re.sub(r"(\.|_)(op|kernels|triton_form)$", "", name)] = cases
    return found


def compile_case(op: str, case: AotCase, chip: Chip) -> Usage:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(case.signature)
    source = ASTSource(
        fn=case.kernel,
        signature=case.signature,
        constexprs={(names.index(name),): value for name, value in case.constexprs.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible},
    )
    try:
        built = triton.compile(source, target=GPUTarget(*TARGETS[chip]), options=dict(case.options))
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return Usage(op, case.name, chip, error=f"{type(error).__name__}: {lines[-1] if lines else ''}")
    registers, spilled = _hip_usage(built.asm["amdgcn"]) if chip == "gfx942" else _cuda_usage(built.asm["cubin"])
    warps = case.options.get("num_warps", 4)
    narrow = len(re.findall(r"ld\.global[.\w]*\.[bus](?:8|16)\b", built.asm.get("ptx", "")))
    return Usage(op, case.name, chip, registers, spilled, built.metadata.shared, warps, narrow)


def _indices(cases: list[AotCase], *, quick: bool) -> list[int]:
    """All cases, or the first of every kernel."""
    first: dict[Any, int] = {}
    for index, case in enumerate(cases):
        first.setdefault(case.kernel, index)
    return list(first.values()) if quick else list(range(len(cases)))


def _compile(wanted: tuple[str, Chip, int]) -> Usage:
    """A case by its index, because kernels cannot be pickled."""
    op, chip, index = wanted
    return compile_case(op, ops()[op](chip)[index], chip)


def _cuda_usage(cubin: bytes) -> tuple[int, int]:
    """(registers per thread, bytes of its stack and local memory): a spill is a local store."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    figures = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return figures["REG"], figures["STACK"] + figures["LOCAL"]


def _hip_usage(assembly: str) -> tuple[int, int]:
    """(vector registers per lane, bytes that a lane spills)."""
    figures = {key: int(value) for key, value in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", assembly)}
    return figures["vgpr_count"], 4 * figures["vgpr_spill_count"]


def _print_table(rows: list[Usage]) -> None:
    width = max((len(row.kernel) for row in rows), default=6)
    print(f"{'op':24} {'kernel':{width}} {'chip':8} {'warps':>5} {'registers':>9} {'spills':>7} {'shared':>8}")
    for row in rows:
        print(
            f"{row.op:24} {row.kernel:{width}} {row.chip:8} {row.warps:5} {row.registers:9} {row.spill_bytes:7} "
            f"{row.shared_bytes:8} {row.problem()}".rstrip()
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.resources", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the table to FILE")
    parser.add_argument("--ops", nargs="*", help="only these ops")
    parser.add_argument("--chips", nargs="*", choices=CHIPS, default=list(CHIPS), help="only these chips")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 8), help="number of compiling processes")
    parser.add_argument("--quick", action="store_true", help="one configuration per kernel")
    options = parser.parse_args(arguments)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as a launch does; silences a warning of Triton 3.9
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        print("TRITON_INTERPRET=1 turns kernels into Python, which cannot be compiled. Unset it.", file=sys.stderr)
        return 2
    chosen = {op: cases for op, cases in ops().items() if not options.ops or op in options.ops}
    if not chosen:
        print(f"No op among {options.ops}. There are: {', '.join(ops())}.", file=sys.stderr)
        return 2
    wanted = [
        (op, chip, index)
        for op, cases in chosen.items()
        for chip in options.chips
        for index in _indices(cases(chip), quick=options.quick)
    ]
    with ProcessPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(_compile, wanted, chunksize=4))
    _print_table(rows)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) | {"problem": row.problem()} for row in rows], indent=1) + "\n")
    problems = [row for row in rows if row.problem()]
    print(f"{len(rows)} kernels for {len(options.chips)} chips: {len(problems)} with problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
