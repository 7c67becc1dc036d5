"""The settings whose memory is measured: model, method, ZeRO stage, ranks, checkpointing, kernels."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from tests.conftest import ROOT
from tests.ports import free_port


class Combination(NamedTuple):
    model: str
    method: str
    stage: int
    ranks: int
    checkpointing: bool
    kernels: bool
    dtype: str
    micro_batches: int
    packing: bool = False
    fp8: bool = False

    @property
    def name(self) -> str:
        marks = (
            ["ckpt"] * self.checkpointing
            + ["off"] * (not self.kernels)
            + ["packed"] * self.packing
            + ["fp8"] * self.fp8
        )
        return "-".join([self.model, self.method, f"z{self.stage}", f"r{self.ranks}", *marks, self.dtype])

    def overrides(self, data: Path, folder: Path) -> list[str]:
        return [
            f"model.path={'smollm2-135m' if self.model == 'smollm2' else 'tiny-llama'}",
            f"model.dtype={self.dtype}",
            f"model.base_dtype={'fp8' if self.fp8 else 'null'}",
            f"model.kernels={'auto' if self.kernels else 'off'}",
            f"method.kind={self.method}",
            f"engine.zero_stage={self.stage}",
            f"engine.activation_checkpointing={str(self.checkpointing).lower()}",
            f"batch.global_rows={self.ranks * self.micro_batches}",
            f"data.train={data}",
            "data.eval=[]",
            f"data.packing={str(self.packing).lower()}",
            "data.too_long=truncate",
            f"data.max_length={256 if self.model == 'smollm2' else 512}",
            "optim.max_steps=2",
            "checkpoint.interval_steps=0",
            "checkpoint.resume=never",
            f"output_dir={folder}",
        ]


_HALF = [
    # method, stage, ranks, checkpointing, kernels, dtype of smollm2, its micro-batches
    ("full", 0, 1, False, True, "fp32", 1),
    ("full", 1, 2, True, True, "fp32", 1),
    ("full", 2, 1, True, False, "fp32", 2),
    ("full", 2, 2, False, True, "bf16", 1),
    ("full", 3, 2, False, True, "bf16", 2),
    ("full", 3, 1, True, True, "fp32", 1),
    ("lora", 0, 2, False, True, "fp32", 2),
    ("lora", 1, 1, False, False, "bf16", 1),
    ("lora", 2, 2, True, True, "bf16", 2),
    ("lora", 2, 1, False, True, "fp32", 1),
    ("lora", 3, 1, False, False, "fp32", 2),
    ("lora", 3, 2, True, True, "fp32", 1),
]
COMBINATIONS = [
    Combination(model, method, stage, ranks, checkpointing, kernels, dtype if large else small_dtype, micro)
    for model, large in (("tiny", False), ("smollm2", True))
    for method, stage, ranks, checkpointing, kernels, dtype, micros in _HALF
    for small_dtype in ["fp32" if stage == 0 else "bf16"]
    for micro in [micros if large else 2]
]


PACKED = [
    Combination("tiny", "lora", 2, 1, False, True, "bf16", 2, packing=True),
    Combination("tiny", "full", 0, 1, True, True, "fp32", 1, packing=True),
]
FP8 = [
    Combination("tiny", "lora", 2, 1, False, True, "bf16", 2, fp8=True),
    Combination("tiny", "lora", 0, 1, False, True, "fp32", 1, fp8=True),
]


def write_text(path: Path, *, short: bool = False) -> Path:
    """One long text that fills all rows but the last, or `short` texts for rows of many samples; every token but the
    last of a row or a text has a label."""
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "a",
        "lazy",
        "dog",
        "and",
        "runs",
        "from",
        "every",
        "hill",
    ]
    chance = random.Random(0)
    texts = [60_000]
    if short:
        texts = [chance.randint(2, 12) for _ in range(6_000)]
    lines = [json.dumps({"text": " ".join(chance.choice(words) for _ in range(count))}) for count in texts]
    path.write_text("\n".join(lines) + "\n")
    return path


def measure(combination: Combination, folder: Path) -> dict[str, int]:
    """Run it under torch's profiler and return rank 0's measurements (see tests/plan/measured.py)."""
    data = write_text(folder / "text.jsonl", short=combination.packing)
    port = free_port()
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    ranks = []
    for rank in range(combination.ranks):
        place = {"RANK": rank, "WORLD_SIZE": combination.ranks, "LOCAL_RANK": rank, "MASTER_PORT": port}
        environment = {name: str(value) for name, value in place.items()}
        if combination.ranks == 1:
            environment = {}
        command = [sys.executable, "-W", "ignore", "-m", "tests.plan.measured", str(folder / f"rank{rank}.json")]
        command += ["smoke", *combination.overrides(data, folder / "run")]
        with (folder / f"rank{rank}.log").open("w") as log:
            ranks.append(
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=os.environ | environment | {"PYTHONPATH": path, "MASTER_ADDR": "127.0.0.1"},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    codes = [process.wait() for process in ranks]
    assert codes == [0] * combination.ranks, (folder / "rank0.log").read_text()[-3000:]
    return json.loads((folder / "rank0.json").read_text())
