#!/usr/bin/env bash
# A chat model of depth 12 (286 M parameters) on one consumer GPU with 24 GB, such as an RTX 4090 or an RTX 3090.
#
#   bash runs/gpu24.sh
#   DEPTH=16 bash runs/gpu24.sh
#
# It needs a network and 15 GB on the disk (depth 12). The table lists the hours of pretraining and of fine-tuning, the
# rows per pass that --device-batch-size auto chooses, and the peak memory in GiB, of which 22.2 can be used:
#
#   depth   RTX 4090       RTX 3090        rows   memory
#   12       4.1 h, 1.5 h   9.5 h, 3.6 h   16     16.8
#   16      16.7 h, 3.0 h  38.8 h, 6.9 h    8     18.7
#   20      53.2 h, 5.1 h  123.6 h, 11.8 h  4     21.3
#
# Depth 24 does not fit. The numbers are calculated, not measured: they assume that a card reaches the same share of its
# peak rate as public runs on 8xH100. To calculate them for another card:
#   python -m scripts.base_train --plan --for 1xRTX4090 --depth 12
#
# Start the script again after an interruption: training resumes from its last checkpoint.
# shellcheck disable=SC1091
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
depth=${DEPTH:-12}
case "$depth" in  # training gets about 34.5 M tokens from a shard
  12) shards=40 ;;
  16) shards=84 ;;
  *) shards=170 ;;
esac

python -m nanochat.dataset -n "$shards"
python -m scripts.tok_train --vocab-size 32768
python -m scripts.base_train --depth "$depth" --model-tag gpu24 --save-every 250 --keep-last 1 --resume
python -m scripts.base_eval -g gpu24 --eval core,bpb,sample --max-per-task 500
python -m scripts.chat_sft --base-tag gpu24 --save-every 250 --keep-last 1 --resume
python -m scripts.chat_eval -i sft -g gpu24 -a ARC-Easy,ARC-Challenge,MMLU,GSM8K,HumanEval,SpellingBee
python -m scripts.report
