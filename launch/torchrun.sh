#!/usr/bin/env bash
# All GPUs of this machine, or WORKERS processes, in one group:   [WORKERS=2] launch/torchrun.sh [CONFIG [a.b=c …]]
# On several machines set NODES, RANK_OF_NODE (0 … NODES-1) and HEAD (host:port of the first) on each of them.
set -euo pipefail
workers=${WORKERS:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110} # torch's 30 s may not do for a checkpoint
if [ "${NODES:-1}" -gt 1 ]; then
  group=(--nnodes "$NODES" --node-rank "$RANK_OF_NODE" --rdzv-backend c10d --rdzv-endpoint "$HEAD" --rdzv-id distgrow)
else
  group=(--standalone)
fi
exec python -m torch.distributed.run "${group[@]}" --nproc-per-node "$workers" \
  -m distgrow train "${1:-configs/digits.yaml}" "${@:2}"
