#!/usr/bin/env bash
# One node of a run over several: start it on every node with the same arguments.
#   NODES=2 HEAD=10.0.0.1 launch/torchrun.sh configs/llama3_8b_lora.yaml output_dir=/shared/run
# The output folder must be one that every node sees. A node that is lost ends the run; the same command resumes it.
set -euo pipefail
: "${NODES:=1}" "${HEAD:=127.0.0.1}" "${PORT:=29500}" "${WORKERS:=gpu}"
exec torchrun --nnodes "$NODES" --nproc-per-node "$WORKERS" --rdzv-backend c10d --rdzv-endpoint "$HEAD:$PORT" \
    --rdzv-id "${RUN_ID:-ft_dist}" -m ft_dist.train "$@"
