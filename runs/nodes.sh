#!/usr/bin/env bash
# A stage on several nodes: run the same command on every node, with its own NODE_RANK. Slurm does that for you with
# runs/slurm.sh.
#
#   NODES=2 NODE_RANK=0 MASTER=10.0.0.1 bash runs/nodes.sh --depth 26 --save-every 250 --keep-last 2
#   NODES=2 NODE_RANK=0 MASTER=10.0.0.1 bash runs/nodes.sh scripts.chat_rl --save-every 60
#
# The first argument may name the stage, by default scripts.base_train: scripts.chat_sft, scripts.chat_rl,
# scripts.base_eval, scripts.chat_eval. Training stages get --resume, because torchrun restarts them:
#
# - A process that dies, or a node that is lost, ends the processes of all nodes. torchrun starts them again, up to
#   RESTARTS times (default 10), and they resume from the last checkpoint: give --save-every or --save-minutes.
# - NODES=4 waits up to WAIT_MINUTES (default 60) for all nodes to be there again. NODES=2:4 starts with those that are
#   there after a minute, at least 2; a node that comes back later joins, which restarts the processes once more.
# - A link that is cut for less than two minutes is a pause, as long as TCP keeps the connections. If they are lost,
#   torchrun ends on the node that no longer reaches MASTER, and is started again there, up to RESTARTS times: each time
#   it waits up to two minutes for MASTER, so 20 minutes in all. The job then resumes from the last checkpoint.
# - The node MASTER, NODE_RANK 0, must stay: it holds the meeting point. If it is lost, start the command there again
#   within these 20 minutes.
#
# All nodes need the same shards (330 of the public ones for depth 26, which trains on 11 B tokens) and tokenizer.
# NANOCHAT_BASE_DIR should be on a shared file system. On local disks only the node of rank 0 has the checkpoints: copy
# the newest one to the others before a restart. The job does not start where a node lacks the checkpoint of rank 0.
#
# ADDRESS: name or address at which the other nodes reach this one (default: its host name). PORT: default 29500.
# RANKS: processes on this node (default: one per GPU, one without any).
#
# Depth 26 takes 2.3 hours on two nodes of 8 H100s, 1.2 hours on four (calculated, without the time that a slow network
# between the nodes would add, for which see docs/scaling.md):
#   python -m scripts.base_train --plan --for 16xH100 --depth 26
# shellcheck disable=SC1091,SC2154  # setup.sh sets ranks
set -euo pipefail
: "${NODES:?number of nodes, or MIN:MAX}" "${NODE_RANK:?0 … nodes-1}" "${MASTER:?address of node 0}"
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
detect_machine
ranks=${RANKS:-$ranks}

stage=scripts.base_train
if [[ "${1:-}" == scripts.* ]]; then
  stage=$1
  shift
fi
resume=(--resume)
if [[ "$stage" == *_eval ]]; then
  resume=()
fi
trap '' USR1  # Slurm's warning is for the stage, which saves on it; torchrun would end
is_host=$([ "$NODE_RANK" = 0 ] && echo true || echo false)

# Otherwise the agent of rank 0 publishes its store's address in its first round only, and a node that joins a later
# round waits for it in vain (torch 2.13).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# torchrun writes its own exceptions to this file, but not the failures of the stage, which it has restarted already.
TORCHELASTIC_ERROR_FILE=$(mktemp)
export TORCHELASTIC_ERROR_FILE
trap 'rm -f "$TORCHELASTIC_ERROR_FILE"' EXIT
lost_the_rendezvous() { grep -qE '"message": "(RendezvousConnection|Dist[A-Za-z]*)Error' "$TORCHELASTIC_ERROR_FILE"; }

agent=
trap 'restarts=0; kill -TERM "$agent"' TERM INT
restarts=${RESTARTS:-10}
for ((attempt = 0; attempt <= restarts; attempt++)); do
  : >"$TORCHELASTIC_ERROR_FILE"
  torchrun --nnodes="$NODES" --node_rank="$NODE_RANK" --nproc_per_node="$ranks" --max-restarts="$restarts" \
    --local-addr="${ADDRESS:-$(hostname)}" --rdzv_backend=c10d --rdzv_endpoint="$MASTER:${PORT:-29500}" \
    --rdzv_conf="is_host=$is_host,join_timeout=$((60 * ${WAIT_MINUTES:-60})),last_call_timeout=60,read_timeout=120" \
    -m "$stage" ${resume[@]+"${resume[@]}"} "$@" &
  agent=$!
  status=0
  wait "$agent" || status=$?
  while kill -0 "$agent" 2>/dev/null; do  # a signal ended the wait, not torchrun
    status=0
    wait "$agent" || status=$?
  done
  if [ "$status" = 0 ] || ! lost_the_rendezvous; then
    exit "$status"
  fi
  echo "torchrun on node $NODE_RANK lost the other nodes: starting it again" >&2
  sleep 5
done
exit "$status"
