#!/usr/bin/env bash
# Pretraining with Slurm, on one or several nodes: one task per node, which starts a process per GPU (runs/nodes.sh).
#
#   sbatch runs/slurm.sh --depth 26                           # from the repository's folder, on a shared file system
#   sbatch --nodes=4 --time=02:00:00 runs/slurm.sh --depth 26
#
# As for runs/nodes.sh, all nodes need the same shards (330 for depth 26) and tokenizer, and a NANOCHAT_BASE_DIR that they share. The time
# limit is that of depth 26 on two nodes of 8 H100s (2.3 hours, calculated) with a reserve. A job that was stopped or
# requeued resumes from its last checkpoint. Add the options of your cluster, such as --account, to the command.
#SBATCH --job-name=nanochat
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.log
#SBATCH --requeue
# shellcheck disable=SC1091,SC2016  # $SLURM_NODEID is that of each task
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"  # Slurm runs a copy of this script
source runs/setup.sh    # once, before the nodes start
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER="${nodes%%$'\n'*}" NODES="$SLURM_JOB_NUM_NODES"
srun bash -c 'NODE_RANK=$SLURM_NODEID exec bash runs/nodes.sh "$@"' nodes.sh --save-every 250 --keep-last 2 --resume "$@"
