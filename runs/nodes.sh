#!/usr/bin/env bash
# Pretraining on several nodes: run the same command on every node, with its own NODE_RANK.
#
#   NODES=4 NODE_RANK=0 MASTER=10.0.0.1 bash runs/nodes.sh --depth 26 --device-batch-size 16
#
# All nodes need the same shards and tokenizer. The simplest way is a NANOCHAT_BASE_DIR on a shared file system. If a
# node fails, start the command again with --resume on the other nodes: the number of nodes may change.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
: "${NODES:?number of nodes}" "${NODE_RANK:?0 … NODES-1}" "${MASTER:?address of node 0}"
detect_machine

exec torchrun --nnodes="$NODES" --node_rank="$NODE_RANK" --nproc_per_node="$((gpus > 0 ? gpus : 1))" \
  --rdzv_backend=c10d --rdzv_endpoint="$MASTER:${PORT:-29500}" -m scripts.base_train "$@"
