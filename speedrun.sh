#!/usr/bin/env bash
# From nothing to a model that answers: environment, tokenizer, pretraining, fine-tuning, evaluation, a short chat.
#
#   bash speedrun.sh                                   # sized to this machine
#   NANOCHAT_DATA_DIR=~/texts bash speedrun.sh         # pretrain on these parquet shards (column "text")
#   NANOCHAT_DATASETS_DIR=~/hub bash speedrun.sh       # GSM8K, MMLU, … from a local mirror of the hub
#   NANOCHAT_EVAL_BUNDLE=~/eval_bundle bash speedrun.sh   # CORE, from a folder of its tasks
#   WANDB_RUN=first bash speedrun.sh                   # log to wandb
#
# Run it again after an interruption: finished stages are skipped, an unfinished one goes on from its checkpoint.
set -euo pipefail
started=$SECONDS

folder() {  # the absolute path of the folder that a variable names; ends the script if there is none
  [ -z "$2" ] || (cd "$2" 2>/dev/null && pwd) || { echo "error: $1 is $2, which is no folder" >&2; exit 1; }
}
NANOCHAT_DATA_DIR=$(folder NANOCHAT_DATA_DIR "${NANOCHAT_DATA_DIR:-}")
NANOCHAT_DATASETS_DIR=$(folder NANOCHAT_DATASETS_DIR "${NANOCHAT_DATASETS_DIR:-}")
NANOCHAT_EVAL_BUNDLE=$(folder NANOCHAT_EVAL_BUNDLE "${NANOCHAT_EVAL_BUNDLE:-}")
NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"
state="$NANOCHAT_BASE_DIR/speedrun"
mkdir -p "$state" || { echo "error: cannot write to $NANOCHAT_BASE_DIR: set NANOCHAT_BASE_DIR" >&2; exit 1; }
NANOCHAT_BASE_DIR=$(folder NANOCHAT_BASE_DIR "$NANOCHAT_BASE_DIR")
state="$NANOCHAT_BASE_DIR/speedrun"
export NANOCHAT_DATA_DIR NANOCHAT_DATASETS_DIR NANOCHAT_EVAL_BUNDLE NANOCHAT_BASE_DIR
if command -v flock >/dev/null; then
  exec 8>"$state/lock"
  flock --nonblock 8 || { echo "error: another speedrun works in $NANOCHAT_BASE_DIR: wait for it, or set NANOCHAT_BASE_DIR" >&2; exit 1; }
fi
source "$(dirname "${BASH_SOURCE[0]}")/runs/setup.sh"
if [ -n "${WANDB_RUN:-}" ]; then pip install -qq --disable-pip-version-check -c constraints.txt wandb; fi

# ---- decide, once: a restart must not change its mind because a network blinked or a GPU is busy ----

online() {  # whether the hub answers
  python -c 'import os, requests; requests.head(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=5)' \
    >/dev/null 2>&1
}
decide() {  # prints: device, GPUs, dtype ("-": the default), pretraining text, chat datasets
  local facts device gpus dtype data datasets
  facts=$(python -m nanochat.hardware)
  read -r device gpus dtype <<<"$facts"
  for power in 8 4 2 1; do  # batches are powers of two
    if [ "$gpus" -ge "$power" ]; then gpus=$power; break; fi
  done
  if [ -n "$NANOCHAT_DATA_DIR" ]; then data=given
  elif [ "$device" = cuda ] && online; then data=public
  else data=primer; fi
  if [ -n "$NANOCHAT_DATASETS_DIR" ]; then datasets=mirror
  elif [ "$data" != primer ] && online; then datasets=hub
  else datasets=primer; fi
  echo "$device $gpus ${NANOCHAT_DTYPE:-$dtype} $data $datasets"
}
asked="$NANOCHAT_DATA_DIR|$NANOCHAT_DATASETS_DIR|${NANOCHAT_DTYPE:-}"
if [ "$(cat "$state/asked" 2>/dev/null || true)" != "$asked" ] || [ ! -s "$state/decided" ]; then
  decided=$(decide)
  if [ -s "$state/decided" ] && [ "$(cat "$state/decided")$(cat "$state/asked")" != "$decided$asked" ]; then
    echo "asked for something else than last time: all stages run anew"
  fi
  rm -f "$state"/*.done "$state"/*.begun
  echo "$decided" >"$state/decided"
  echo "$asked" >"$state/asked"
else
  echo "as decided at the first start (remove $state to decide anew):"
fi
read -r device gpus dtype data datasets <"$state/decided"

if [ "$device" = cuda ]; then echo "machine: $gpus CUDA GPU(s)"; else echo "machine: $device"; fi
if [ "$dtype" != - ]; then
  if [ -n "${NANOCHAT_DTYPE:-}" ]; then why="as NANOCHAT_DTYPE says"; else why="which this CPU multiplies faster than float32"; fi
  echo "dtype:   $dtype, $why"
  export NANOCHAT_DTYPE=$dtype
fi
case "$data" in
  given) echo "text:    $NANOCHAT_DATA_DIR, as NANOCHAT_DATA_DIR says" ;;
  public) echo "text:    the public shards, as there are GPUs and a network" ;;
  primer)
    export NANOCHAT_DATA_DIR="$NANOCHAT_BASE_DIR/primer"
    echo "text:    the embedded corpus, as there is no GPU or no network, and NANOCHAT_DATA_DIR is not set" ;;
esac
case "$datasets" in
  mirror) echo "chat:    $NANOCHAT_DATASETS_DIR, as NANOCHAT_DATASETS_DIR says" ;;
  hub) echo "chat:    the public datasets" ;;
  primer) echo "chat:    the embedded conversations" ;;
esac

train=(python -m)
vocab=32768 shards=170 eval_tokens=41943040
if [ "$data" = primer ]; then
  vocab=2048 eval_tokens=65536
  size=(--depth 4 --head-dim 64 --max-seq-len 512 --device-batch-size 8 --total-batch-size 4096 --num-iterations 640
        --eval-every 0)
elif [ "$device" = cuda ]; then
  train=(torchrun --standalone --nproc_per_node="$gpus" -m)
  case "$gpus" in  # the depth whose training takes some hours at most
    8) size=(--depth 24 --target-param-data-ratio 8 --device-batch-size 16) ;;
    4) size=(--depth 20 --device-batch-size 16) ;;
    2) size=(--depth 16 --device-batch-size 16) shards=80 ;;
    *) size=(--depth 12 --device-batch-size 16) shards=40 ;;
  esac
else
  vocab=8192 eval_tokens=524288
  size=(--depth 4 --head-dim 64 --max-seq-len 512 --device-batch-size 16 --total-batch-size 8192 --num-iterations 500)
fi
if [ "$datasets" = primer ]; then
  sft=(--smoltalk-epochs 0 --mmlu-epochs 0 --gsm8k-epochs 0 --simplespelling-epochs 0 --spellingbee-epochs 0
       --identity-epochs 0 --primer-epochs 3)
  exam=(-a QuizFree,QuizChoice,Sums -m 64)
else
  sft=()
  exam=(-a ARC-Easy,ARC-Challenge,MMLU,GSM8K,HumanEval,SpellingBee)  # ChatCORE's
  if [ "$device" != cuda ]; then  # 250 updates: words to spell would take up most of them
    sft+=(--num-iterations 250 --identity-epochs 10 --simplespelling-epochs 0 --spellingbee-epochs 0)
    exam+=(-x 200)
  fi
fi
evals=bpb,sample
if [ "$data" = public ] || [ -n "$NANOCHAT_EVAL_BUNDLE" ]; then evals=core,$evals; fi
run=(${WANDB_RUN:+--run "$WANDB_RUN"})
echo "model:   ${size[*]}"

# ---- run ----

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
stage base_eval "${train[@]}" scripts.base_eval -g speedrun --eval "$evals" --max-per-task 500 --split-tokens "$eval_tokens"
stage chat_sft "${train[@]}" scripts.chat_sft --base-tag speedrun "${sft[@]}" "${often[@]}" $(resume chat_sft) "${run[@]}"
stage chat_eval "${train[@]}" scripts.chat_eval -i sft -g speedrun "${exam[@]}"

# ---- show ----

python -m scripts.report
for question in "What is the capital of France?" "What is 47 + 85?" "Who are you?"; do
  echo "> $question"
  python -m scripts.chat_cli -g speedrun -t 0 -p "$question"
done
echo "done in $((SECONDS - started)) s. Chat with it:  source .venv/bin/activate && python -m scripts.chat_cli"
