"""Prefaulted memory is used by later allocations, and counted only once."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from ft_dist.config import load_config
from ft_dist.engine.build import own_trained_weights
from ft_dist.model.builtin import resolve_model
from ft_dist.model.load import load_model

MIB = 2**20
PROGRAM = """
import json, resource, sys, threading
import torch
from ft_dist.heap import keep_freed_memory, touch_ahead
from ft_dist.resources import peak_memory_bytes

keep_freed_memory()
free = touch_ahead(int(sys.argv[1]))
for thread in threading.enumerate():
    if thread.name == "touch-ahead":
        thread.join()
free()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
tensors = [torch.zeros(16 * 2**20, dtype=torch.uint8) for _ in range(16)]
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(json.dumps([faults, peak_memory_bytes(torch.device("cpu"))]))
"""


def run(nbytes: int) -> tuple[int, int]:
    """Page faults of allocating 256 MiB of tensors, and the peak memory of the process."""
    command = [sys.executable, "-c", PROGRAM, str(nbytes)]
    environment = {"GLIBC_TUNABLES": "", "PATH": ""}  # pages of 4 KiB
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    faults, peak = json.loads(done.stdout)
    return faults, peak


def test_tensors_reuse_prefaulted_memory():
    faults, peak = run(0)
    fewer, same_peak = run(280 * MIB)
    assert fewer < faults / 10
    assert same_peak < peak + 40 * MIB


def test_trainable_weights_are_copied_out_of_the_mapped_file():
    settings = load_config("smoke", ["model.dtype=fp32"]).model
    model, _ = load_model(settings, folder=resolve_model("tiny-llama"), vocabulary=1)
    for parameter in list(model.parameters())[:3]:
        parameter.requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert all(mapped(parameter) for parameter in model.parameters())
    own_trained_weights(model)
    for name, parameter in model.named_parameters():
        assert mapped(parameter) != parameter.requires_grad
        assert torch.equal(parameter, before[name])


def mapped(tensor: torch.Tensor) -> bool:
    """True if the tensor is stored in the memory-mapped model file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, name = line.split()
        begin, end = (int(edge, 16) for edge in span.split("-"))
        if begin <= tensor.data_ptr() < end:
            return name.endswith("model.safetensors")
    return False
