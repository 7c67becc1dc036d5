"""NVIDIA's driver version, and one GPU's memory errors and faults in the kernel log.

Sources: `nvidia-smi -q -x` (https://docs.nvidia.com/deploy/nvidia-smi) and, if readable, the kernel log's Xid lines
(https://docs.nvidia.com/deploy/xid-errors). Without torch.
"""

import re
import subprocess
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

TIMEOUT_S = 5.0
HARDWARE_XIDS = {
    48: "uncorrectable memory error",
    64: "a memory row could not be remapped",
    74: "NVLink error",
    79: "fallen off the bus",
    95: "uncontained memory error",
    119: "GSP timeout",
    120: "GSP error",
    140: "unrecovered memory error",
}
"""Errors for which NVIDIA's catalogue advises resetting or replacing the GPU; programs can cause other errors"""

_XID = re.compile(r"NVRM: Xid \(PCI:([0-9a-fA-F:]+)(?:\.\d)?\): (\d+),")


def ask_driver(uuid: str) -> dict[str, Any]:
    """`driver` (its version) and `errors` (one line each) of the GPU `uuid`; empty if nvidia-smi does not answer."""
    answer = _output("nvidia-smi", "-q", "-x", "-i", uuid)
    return parse_query(answer, _output("dmesg")) if answer else {}


def parse_query(query: str, kernel_log: str = "") -> dict[str, Any]:
    """Like `ask_driver`, from the output of `nvidia-smi -q -x -i ONE` and `dmesg`."""
    try:
        root = ElementTree.fromstring(query)  # noqa: S314 - from the driver's own program
    except ElementTree.ParseError:
        return {}
    gpu = root.find("gpu")
    if gpu is None:
        return {}
    found = []
    errors = _uncorrected(gpu)
    if errors:
        found.append(f"{errors} uncorrectable memory errors (ECC)")
    for tag, words in (
        ("remapped_rows/remapped_row_failure", "a memory row that could not be remapped"),
        ("remapped_rows/remapped_row_pending", "memory rows to remap at the next reset"),
        ("retired_pages/pending_retirement", "memory pages to retire at the next reset"),
    ):
        if (gpu.findtext(tag) or "").strip() == "Yes":
            found.append(words)
    found += _logged_faults(kernel_log, gpu.get("id", ""))
    return {"driver": (root.findtext("driver_version") or "unknown").strip(), "errors": found}


def _uncorrected(gpu: ElementTree.Element) -> int:
    """Uncorrectable errors since the driver was loaded; older GPUs count double-bit errors instead."""
    counters = [counter for counter in gpu.iterfind("ecc_errors/volatile/*") if "uncorrectable" in counter.tag]
    counters += gpu.iterfind("ecc_errors/volatile/double_bit/total")
    counts = [(counter.text or "").strip() for counter in counters]
    return sum(int(count) for count in counts if count.isdigit())


def _logged_faults(kernel_log: str, bus_id: str) -> Sequence[str]:
    """Faults of the GPU at a PCI address such as 00000000:65:00.0 since the machine was booted."""
    # the kernel writes four digits of the domain, and no function
    wanted = bus_id.lower()[-12:].rpartition(".")[0]
    codes = {int(code) for place, code in _XID.findall(kernel_log) if wanted and place.lower() == wanted}
    return [f"Xid {code} in the kernel log ({HARDWARE_XIDS[code]})" for code in sorted(codes & set(HARDWARE_XIDS))]


def _output(*command: str) -> str:
    """Its output; empty if the program is missing, forbidden, failing or too slow."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""
