#!/usr/bin/env bash
# Everything that needs a GPU, in one command and under ten minutes: parity of the kernels in bf16; LoRA of the
# Llama-3-8B shape and full fine-tuning of a 3B shape, bare steps beside Hugging Face + PEFT, Liger and Unsloth and whole
# runs of the product; the kernels alone. Offline, from a source tree that is not installed.
#   [OUT=DIR] [PYTHON=python3] [WHEELS=DIR] [PLAN=1] benchmarks/gpu.sh
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
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
# torch, triton and transformers have to be there and stay as they are; WHEELS=DIR installs the rest from a folder of
# wheels, as far as it goes
if [ -n "${WHEELS:-}" ]; then
    "$PYTHON" -m pip list --format=freeze 2>/dev/null | grep -iE '^(torch|triton|transformers|numpy)==' >"$OUT/.pins"
    install() {
        "$PYTHON" -m pip install --quiet --no-index --find-links "$WHEELS" -c "$OUT/.pins" "$@" ||
            echo "$WHEELS lacks something of: $*; what needs it is told as failed" >&2
    }
    install peft
    install 'deepspeed>=0.19,<0.20' typer rich 'pydantic>=2.10' pyyaml xxhash filelock fsspec gguf jinja2
    install --no-deps liger-kernel
    install unsloth
    rm -f "$OUT/.pins"
fi
sides=(ours hf)
"$PYTHON" -c 'import liger_kernel' 2>/dev/null && sides+=(liger)
"$PYTHON" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("unsloth") is None)' && sides+=(unsloth)
bf16=(--device cuda --dtype bf16 --warmup 2 --steps 5 --turns 1 --limit-s 60 --loss-tolerance 0.01 --sides "${sides[@]}")
run 90 benchmarks.kernels.parity --device cuda --json "$name-parity.json"
run 150 benchmarks.training.pair --model llama3-8b --rows 2 --tokens 4096 --method lora "${bf16[@]}" \
    --json "$name-training-llama3-8b-lora.json"
run 75 ft_dist.cli bench llama3-8b --method lora --length 4096 --rows 2 batch.micro_rows=2 --to "$name-bench-llama3-8b-lora"
run 110 benchmarks.training.pair --model llama3.2-3b --rows 2 --tokens 4096 --method full "${bf16[@]}" \
    --json "$name-training-llama3.2-3b-full.json"
run 75 ft_dist.cli bench llama3.2-3b --method full --length 4096 --rows 2 batch.micro_rows=2 --no-checkpoint \
    --to "$name-bench-llama3.2-3b-full"
run 90 benchmarks.kernels --device cuda --quick --json "$name-kernels.json"
# what `ft-dist plan` said of 8 settings beside what they took: memory and step, with the error (PLAN=1: ten minutes more)
[ -z "${PLAN:-}" ] || run 580 benchmarks.plan.measure --json "$name-plan.json"
exit "$failed"
