"""Recorded output of nvidia-smi and the kernel log, with and without planted faults."""

import os
from pathlib import Path

import pytest

from ft_dist.preflight.nvidia import ask_driver, parse_query

# T4, driver 515, shortened
T4 = """<?xml version="1.0" ?>
<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v11.dtd">
<nvidia_smi_log>
    <timestamp>Mon Apr 24 16:22:39 2023</timestamp>
    <driver_version>515.105.01</driver_version>
    <attached_gpus>1</attached_gpus>
    <gpu id="00000000:00:1E.0">
        <product_name>Tesla T4</product_name>
        <uuid>GPU-d37e67a5-91dd-3774-a5cb-99096249601a</uuid>
        <ecc_errors>
            <volatile>
                <sram_correctable>0</sram_correctable>
                <sram_uncorrectable>0</sram_uncorrectable>
                <dram_correctable>0</dram_correctable>
                <dram_uncorrectable>0</dram_uncorrectable>
            </volatile>
            <aggregate>
                <sram_correctable>0</sram_correctable>
                <sram_uncorrectable>0</sram_uncorrectable>
                <dram_correctable>0</dram_correctable>
                <dram_uncorrectable>0</dram_uncorrectable>
            </aggregate>
        </ecc_errors>
        <retired_pages>
            <pending_blacklist>No</pending_blacklist>
            <pending_retirement>No</pending_retirement>
        </retired_pages>
        <remapped_rows>N/A</remapped_rows>
    </gpu>
</nvidia_smi_log>
"""
# newer GPUs with newer drivers print these parts instead
NEWER = T4.replace(
    "<sram_uncorrectable>0</sram_uncorrectable>",
    "<sram_uncorrectable_parity>0</sram_uncorrectable_parity><sram_uncorrectable_secded>0</sram_uncorrectable_secded>",
).replace(
    "<remapped_rows>N/A</remapped_rows>",
    "<remapped_rows><remapped_row_corr>0</remapped_row_corr><remapped_row_unc>0</remapped_row_unc>"
    "<remapped_row_pending>No</remapped_row_pending><remapped_row_failure>No</remapped_row_failure></remapped_rows>",
)
# a GeForce has no ECC memory
GEFORCE = T4.replace(">0<", ">N/A<").replace(">No<", ">N/A<")
OLDER = T4[: T4.index("<ecc_errors>")] + (
    "<ecc_errors><volatile><single_bit><device_memory>9</device_memory><total>9</total></single_bit>"
    "<double_bit><device_memory>0</device_memory><total>0</total></double_bit></volatile></ecc_errors>"
    "</gpu></nvidia_smi_log>"
)


@pytest.mark.parametrize("query", [T4, NEWER, GEFORCE, OLDER])
def test_a_healthy_gpu_has_a_driver_and_no_errors(query):
    assert parse_query(query) == {"driver": "515.105.01", "errors": []}


@pytest.mark.parametrize(
    "query, before, after, error",
    [
        (T4, "<dram_uncorrectable>0", "<dram_uncorrectable>2", "2 uncorrectable memory errors (ECC)"),
        (NEWER, "<sram_uncorrectable_parity>0", "<sram_uncorrectable_parity>1", "1 uncorrectable memory errors (ECC)"),
        (OLDER, "<total>0", "<total>3", "3 uncorrectable memory errors (ECC)"),
        (NEWER, "<remapped_row_failure>No", "<remapped_row_failure>Yes", "a memory row that could not be remapped"),
        (NEWER, "<remapped_row_pending>No", "<remapped_row_pending>Yes", "memory rows to remap at the next reset"),
        (T4, "<pending_retirement>No", "<pending_retirement>Yes", "memory pages to retire at the next reset"),
    ],
)
def test_a_fault_is_named(query, before, after, error):
    assert before in query
    assert parse_query(query.replace(before, after, 1))["errors"] == [error]


def test_earlier_errors_are_not_a_fault():
    """`aggregate` counts over the GPU's lifetime."""
    start, end = T4.split("<aggregate>")
    assert parse_query(start + "<aggregate>" + end.replace("correctable>0<", "correctable>7<"))["errors"] == []


LOG = """[    2.118] nvidia 0000:00:1e.0: enabling device (0000 -> 0003)
[12345.678901] NVRM: Xid (PCI:0000:00:1e): 31, pid=1234, name=python3, Ch 00000008, intr 00000000. MMU Fault
[12346.000001] NVRM: Xid (PCI:0000:00:1e): 79, pid=1234, GPU has fallen off the bus.
[12346.000002] NVRM: Xid (PCI:0000:00:1e): 79, pid=1234, GPU has fallen off the bus.
[12347.000003] NVRM: Xid (PCI:0000:65:00): 64, pid='N/A', Row Remapper: Failed to remap row
"""


def test_hardware_faults_in_the_kernel_log_count_for_their_gpu_only():
    assert parse_query(T4, LOG)["errors"] == ["Xid 79 in the kernel log (fallen off the bus)"]
    other = T4.replace("00000000:00:1E.0", "00000000:65:00.0")
    assert parse_query(other, LOG)["errors"] == ["Xid 64 in the kernel log (a memory row could not be remapped)"]
    assert parse_query(T4.replace("00000000:00:1E.0", "00000000:0A:00.0"), LOG)["errors"] == []


@pytest.mark.parametrize("answer", ["", "No devices were found\n", "<nvidia_smi_log></nvidia_smi_log>"])
def test_no_answer_is_not_a_fault(answer):
    assert parse_query(answer, LOG) == {}


def program(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_the_driver_is_queried_with_its_own_programs(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path), "/usr/bin", "/bin"]))
    (tmp_path / "t4.xml").write_text(T4)
    (tmp_path / "log").write_text(LOG)
    program(tmp_path, "dmesg", f"cat {tmp_path}/log")
    program(tmp_path, "nvidia-smi", f'[ "$*" = "-q -x -i GPU-d37e67a5" ] && cat {tmp_path}/t4.xml')
    assert ask_driver("GPU-d37e67a5") == parse_query(T4, LOG)
    assert ask_driver("GPU-other") == {}
    # most users may not read the kernel log
    program(tmp_path, "dmesg", "echo 'dmesg: read kernel buffer failed: Operation not permitted' >&2; exit 1")
    assert ask_driver("GPU-d37e67a5") == parse_query(T4)
    (tmp_path / "nvidia-smi").unlink()
    assert ask_driver("GPU-d37e67a5") == {}
