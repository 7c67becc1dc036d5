#!/usr/bin/env bash
# Everything that needs a GPU, in one command and under ten minutes, from a source tree that is not installed, offline.
#   [PYTHON=python3] [OUT=DIR] [WHEELS=DIR] benchmarks/gpu.sh [--list] [--dry-run] [--only STAGE ...] [--total-s 560]
# Needs torch, triton and transformers there; WHEELS is a folder made by benchmarks/offline_wheels.sh with the rest.
# Results: results.jsonl (a row as soon as it is known), log.txt, profile.txt; benchmarks/gpu_report.py reads them.
root=$(cd "$(dirname "$0")/.." && pwd) || exit 1
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" -m benchmarks.gpu "$@"
