#!/usr/bin/env bash
# Pretraining on several nodes: run this on every node, with the same command but for NODE_RANK.
#
#   NODES=4 NODE_RANK=0 MASTER=10.0.0.1 bash runs/nodes.sh --depth 26 --device-batch-size 16
#
# The nodes need the same shards and tokenizer; NANOCHAT_BASE_DIR on a shared file system gives them that, and any of
# them may then be lost: start all again with --resume, on as many nodes as there are.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
: "${NODES:?number of nodes}" "${NODE_RANK:?0 … NODES-1}" "${MASTER:?address of node 0}"

facts=$(python -m nanochat.hardware)
read -r _ gpus _ <<<"$facts"
exec torchrun --nnodes="$NODES" --node_rank="$NODE_RANK" --nproc_per_node="$((gpus > 0 ? gpus : 1))" \
  --rdzv_backend=c10d --rdzv_endpoint="$MASTER:${PORT:-29500}" -m scripts.base_train "$@"
