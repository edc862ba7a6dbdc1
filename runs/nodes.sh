#!/usr/bin/env bash
# Pretraining on several nodes: run the same command on every node, with its own NODE_RANK. Slurm does that for you with
# runs/slurm.sh.
#
#   NODES=2 NODE_RANK=0 MASTER=10.0.0.1 bash runs/nodes.sh --depth 26 --save-every 250 --keep-last 2
#
# All nodes need the same shards (330 of the public ones for depth 26, which trains on 11 B tokens) and tokenizer. The
# simplest way is a NANOCHAT_BASE_DIR on a shared file system. If a node fails, start the command again with --resume and
# a lower NODES on the other nodes.
#
# Depth 26 takes 2.3 hours on two nodes of 8 H100s, 1.2 hours on four (calculated, without the time that a slow network
# between the nodes would add):
#   python -m scripts.base_train --plan --for 16xH100 --depth 26
# shellcheck disable=SC1091,SC2154  # setup.sh sets ranks
set -euo pipefail
: "${NODES:?number of nodes}" "${NODE_RANK:?0 … NODES-1}" "${MASTER:?address of node 0}"
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
detect_machine

exec torchrun --nnodes="$NODES" --node_rank="$NODE_RANK" --nproc_per_node="$ranks" \
  --rdzv_backend=c10d --rdzv_endpoint="$MASTER:${PORT:-29500}" -m scripts.base_train "$@"
