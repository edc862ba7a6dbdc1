#!/usr/bin/env bash
# From nothing to a model that answers: environment, tokenizer, pretraining, fine-tuning, evaluation, a short chat.
#
#   bash speedrun.sh                                   # sized to this machine
#   NANOCHAT_DATA_DIR=~/texts bash speedrun.sh         # pretrain on these parquet shards (column "text")
#   NANOCHAT_DATASETS_DIR=~/hub bash speedrun.sh       # GSM8K, MMLU, … from a local mirror of the hub
#   WANDB_RUN=first bash speedrun.sh                   # log to wandb (pip install wandb)
#
# Run it again after an interruption: finished stages are skipped, an unfinished one goes on from its checkpoint.
set -euo pipefail
started=$SECONDS
source "$(dirname "${BASH_SOURCE[0]}")/runs/setup.sh"

export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"
state="$NANOCHAT_BASE_DIR/speedrun"
mkdir -p "$state"
if command -v flock >/dev/null; then
  exec 8>"$state/lock"
  flock --nonblock 8 || { echo "error: another speedrun works in $NANOCHAT_BASE_DIR: wait, or set NANOCHAT_BASE_DIR" >&2; exit 1; }
fi

# ---- decide ----

read -r device gpus dtype <<<"$(python -m nanochat.hardware)"
online() {  # whether the hub answers
  python -c 'import os, requests; requests.head(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=5)' \
    >/dev/null 2>&1
}

if [ "$device" = cuda ]; then echo "machine: $gpus CUDA GPU(s)"; else echo "machine: $device"; fi
if [ "$dtype" = bfloat16 ] && [ -z "${NANOCHAT_DTYPE:-}" ]; then
  echo "dtype:   bfloat16, which this CPU multiplies faster than float32"
  export NANOCHAT_DTYPE=bfloat16
fi
if [ -n "${NANOCHAT_DATA_DIR:-}" ]; then
  data=given
  echo "text:    $NANOCHAT_DATA_DIR, as NANOCHAT_DATA_DIR says"
elif [ "$device" = cuda ] && online; then
  data=public
  echo "text:    the public shards, as there are GPUs and a network"
else
  data=primer
  export NANOCHAT_DATA_DIR="$NANOCHAT_BASE_DIR/primer"
  echo "text:    the embedded corpus, as there is no GPU or no network and NANOCHAT_DATA_DIR is not set"
fi
if [ "$data" = primer ]; then
  datasets=primer
elif [ -n "${NANOCHAT_DATASETS_DIR:-}" ] || online; then
  datasets=hub
else
  datasets=primer
  echo "chat:    the embedded conversations, as there is no network and NANOCHAT_DATASETS_DIR is not set"
fi

train=(python -m)
vocab=32768 shards=170 eval_tokens=41943040
if [ "$data" = primer ]; then
  vocab=2048
  size=(--depth 4 --head-dim 64 --max-seq-len 512 --device-batch-size 8 --total-batch-size 4096 --num-iterations 640
        --eval-every 0)
  eval_tokens=65536
elif [ "$device" = cuda ]; then
  train=(torchrun --standalone --nproc_per_node="$gpus" -m)
  case "$gpus" in  # the depth whose training takes some hours at most
    8) size=(--depth 24 --target-param-data-ratio 8 --device-batch-size 16) ;;
    4 | 5 | 6 | 7) size=(--depth 20 --device-batch-size 16) ;;
    2 | 3) size=(--depth 16 --device-batch-size 16) shards=80 ;;
    *) size=(--depth 12 --device-batch-size 16) shards=40 ;;
  esac
else
  vocab=8192
  size=(--depth 4 --head-dim 64 --max-seq-len 512 --device-batch-size 16 --total-batch-size 8192 --num-iterations 500)
  eval_tokens=524288
fi
if [ "$datasets" = primer ]; then
  sft=(--smoltalk-epochs 0 --mmlu-epochs 0 --gsm8k-epochs 0 --identity-epochs 0 --primer-epochs 2)
  exam=(-a QuizFree,QuizChoice,Sums -m 64)
else
  sft=()
  exam=(-a ARC-Easy,ARC-Challenge,MMLU,GSM8K)
  [ "$device" = cuda ] || { sft+=(--num-iterations 250 --identity-epochs 10); exam+=(-x 500); }
fi
run=(${WANDB_RUN:+--run "$WANDB_RUN"})
echo "model:   ${size[*]}"

# ---- run ----

settings=$(echo "$data $datasets $vocab ${size[*]} ${NANOCHAT_DATA_DIR:-} ${NANOCHAT_DATASETS_DIR:-}" | cksum)
if [ -f "$state/settings" ] && [ "$(cat "$state/settings")" != "$settings" ]; then
  echo "other settings than last time: all stages run anew"
  rm -f "$state"/*.done "$state"/*.begun
fi
echo "$settings" > "$state/settings"

stage() {  # stage NAME COMMAND…: runs the command unless it has succeeded before
  local name=$1
  shift
  if [ -f "$state/$name.done" ]; then
    echo "== $name: done before"
    return
  fi
  touch "$state/$name.begun"
  echo "== $name: $*"
  local begin=$SECONDS
  "$@"
  touch "$state/$name.done"
  echo "== $name took $((SECONDS - begin)) s"
}

resume() { [ ! -f "$state/$1.begun" ] || echo --resume; }  # begun before with these settings: go on from there
often=(--model-tag speedrun --save-every 250 --keep-last 1)
case "$data" in
  primer) stage data python -m scripts.primer --data-dir "$NANOCHAT_DATA_DIR" ;;
  public) stage data python -m nanochat.dataset -n "$shards" ;;
esac
stage tok_train python -m scripts.tok_train --vocab-size "$vocab"
stage tok_eval python -m scripts.tok_eval
stage base_train "${train[@]}" scripts.base_train "${size[@]}" --eval-tokens "$eval_tokens" "${often[@]}" $(resume base_train) "${run[@]}"
stage base_eval "${train[@]}" scripts.base_eval -g speedrun --split-tokens "$eval_tokens"
stage chat_sft "${train[@]}" scripts.chat_sft --base-tag speedrun "${sft[@]}" "${often[@]}" $(resume chat_sft) "${run[@]}"
stage chat_eval "${train[@]}" scripts.chat_eval -i sft -g speedrun "${exam[@]}"

# ---- show ----

python -m scripts.report
for question in "What is the capital of France?" "What is 47 + 85?" "Who are you?"; do
  echo "> $question"
  python -m scripts.chat_cli -g speedrun -t 0 -p "$question"
done
echo "done in $((SECONDS - started)) s. Chat with it:  source .venv/bin/activate && python -m scripts.chat_cli"
