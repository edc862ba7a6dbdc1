#!/usr/bin/env bash
# A stage with Slurm, on one or several nodes: one task per node, which starts a process per GPU (runs/nodes.sh).
#
#   sbatch runs/slurm.sh --depth 26                           # from the repository's folder, on a shared file system
#   sbatch --nodes=4 --time=02:00:00 runs/slurm.sh --depth 26
#   sbatch --time=01:00:00 runs/slurm.sh scripts.chat_rl      # or another stage, see runs/nodes.sh
#
# The time limit is that of depth 26 on two nodes of 8 H100s (2.3 hours, calculated) with a reserve. Five minutes before
# it ends, Slurm sends SIGUSR1, on which the stage saves a checkpoint. A job that was stopped or requeued resumes from its
# last checkpoint. When a node is lost, Slurm requeues the job; to continue on those that are left instead:
#
#   NODES=1:2 sbatch --no-kill runs/slurm.sh --depth 26
#
# Add the options of your cluster, such as --account, to the command.
#SBATCH --job-name=nanochat
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.log
#SBATCH --requeue
#SBATCH --signal=USR1@300
# shellcheck disable=SC1091,SC2016  # $SLURM_NODEID is that of each task
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"  # Slurm runs a copy of this script
source runs/setup.sh    # once, before the nodes start
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER="${nodes%%$'\n'*}" NODES="${NODES:-$SLURM_JOB_NUM_NODES}"
if [[ "${1:-}" != scripts.* ]]; then
  set -- scripts.base_train --save-every 250 --keep-last 2 "$@"
fi
SLURM_NO_KILL=1 srun bash -c 'NODE_RANK=$SLURM_NODEID exec bash runs/nodes.sh "$@"' nodes.sh "$@"
