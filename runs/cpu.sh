#!/usr/bin/env bash
# A small chat model from your own text, on a CPU, with the sizes of speedrun.sh for a machine without a GPU.
#
#   bash runs/cpu.sh ~/books                 # a folder of .txt, .md, .jsonl, .csv or parquet, or one such file
#   VOCAB_SIZE=2048 bash runs/cpu.sh ~/notes # less than 8 MB of text
#
# It needs 2 GB of memory, and a network only for .venv. It takes about 15 minutes on two cores of a Xeon with AMX (measured with 69 MB
# of books and speedrun.sh, which fine-tunes on public datasets instead). To calculate the time on your machine:
#   python -m scripts.base_train --plan --depth 4 --head-dim 64 --max-seq-len 512 --total-batch-size 8192 --num-iterations 500
#
# The model writes like your text, and answers questions about the primer's facts. Start the script again after an
# interruption: training resumes from its last checkpoint.
# shellcheck disable=SC1091
set -euo pipefail
if [ $# -ne 1 ]; then echo "usage: bash runs/cpu.sh FOLDER" >&2; exit 1; fi
text=$(realpath "$1")
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export NANOCHAT_DATA_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}/text"

python -m scripts.make_shards "$text" --out "$NANOCHAT_DATA_DIR"
python -m scripts.tok_train --vocab-size "${VOCAB_SIZE:-8192}"
python -m scripts.base_train --depth 4 --head-dim 64 --max-seq-len 512 --total-batch-size 8192 --num-iterations 500 \
  --eval-tokens 524288 --model-tag cpu --save-every 100 --keep-last 1 --resume
python -m scripts.base_eval -g cpu --split-tokens 524288
python -m scripts.chat_sft --base-tag cpu --primer-epochs 3 --smoltalk-epochs 0 --mmlu-epochs 0 --gsm8k-epochs 0 \
  --simplespelling-epochs 0 --spellingbee-epochs 0 --identity-epochs 0 --save-every 100 --keep-last 1 --resume
python -m scripts.chat_cli -g cpu -p "What is the capital of France?"
