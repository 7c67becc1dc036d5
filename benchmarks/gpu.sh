#!/usr/bin/env bash
# Everything that needs a GPU, in one command and under ten minutes: parity of the kernels in bf16, their benchmarks,
# a LoRA step of the Llama-3-8B shape beside Hugging Face's, and the error of `ft-dist plan` (ten minutes more). Offline, from a source tree that is not installed.
#   [OUT=DIR] [PYTHON=python3] [WHEELS=DIR] benchmarks/gpu.sh [--quick]
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
unset TRITON_INTERPRET
mkdir -p "$OUT"
chip=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-").replace("/", "-"))') || {
    echo "torch sees no GPU; this script needs one" >&2
    exit 2
}
name="$OUT/$(date -u +%Y-%m-%d)-$chip"
failed=0
run() { # run LIMIT_SECONDS MODULE ARGUMENTS...
    echo "== python -m ${*:2}"
    timeout "$1" "$PYTHON" -m "${@:2}" || { echo "FAILED ($?): ${*:2}" >&2; failed=1; }
}
run 150 benchmarks.kernels.parity --device cuda --json "$name-parity.json"
run 270 benchmarks.kernels --device cuda --json "$name-kernels.json" "$@"
# peft is all that it needs beside torch and transformers: WHEELS=DIR installs it from a folder of wheels
if [ -n "${WHEELS:-}" ]; then "$PYTHON" -m pip install --quiet --no-index --no-deps --find-links "$WHEELS" peft || failed=1; fi
run 160 benchmarks.training --model llama3-8b --device cuda --dtype bf16 --rows 2 --tokens 4096 --warmup 2 --steps 5 \
    --turns 1 --json "$name-training-llama3-8b-lora.json"
# D. what `ft-dist plan` said of 8 settings beside what they took: memory and step, with the error
run 580 benchmarks.plan.measure --json "$name-plan.json"
exit "$failed"
