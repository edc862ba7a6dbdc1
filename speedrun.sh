#!/usr/bin/env bash
# The full pipeline: environment, tokenizer, pretraining, fine-tuning, evaluation, and a few questions to the new model.
#
#   bash speedrun.sh                                      # sized to this machine
#   NANOCHAT_SPEEDRUN=tiny bash speedrun.sh               # all stages at toy size, in one or two minutes on two cores
#   NANOCHAT_DATA_DIR=~/texts bash speedrun.sh            # pretrain on these parquet shards (column "text")
#   NANOCHAT_DATASETS_DIR=~/hub bash speedrun.sh          # GSM8K, MMLU, … from a local mirror of the hub
#   NANOCHAT_EVAL_BUNDLE=~/eval_bundle bash speedrun.sh   # evaluate CORE too, from a folder with its tasks
#   WANDB_RUN=first bash speedrun.sh                      # log to wandb
#   NANOCHAT_VENV=~/venv bash speedrun.sh                 # use this environment instead of setting up .venv
#
# Everything is written to NANOCHAT_BASE_DIR (default ~/.cache/nanochat; tiny: ~/.cache/nanochat-tiny). After an
# interruption run the same command again: finished stages are skipped, the unfinished one resumes from its checkpoint.
set -euo pipefail
started=$SECONDS

fail() { echo "error: $1" >&2; exit 1; }

absolute_path() {  # absolute_path VARIABLE FOLDER: the absolute path of the folder, or nothing if FOLDER is empty
  [ -z "$2" ] || (cd "$2" 2>/dev/null && pwd) || fail "$1 is $2, which is not a folder"
}

speedrun=${NANOCHAT_SPEEDRUN:-}
case "$speedrun" in
  "") default_base="$HOME/.cache/nanochat" ;;
  tiny) default_base="$HOME/.cache/nanochat-tiny" ;;
  *) fail "NANOCHAT_SPEEDRUN is $speedrun: use tiny, or unset it" ;;
esac
NANOCHAT_DATA_DIR=$(absolute_path NANOCHAT_DATA_DIR "${NANOCHAT_DATA_DIR:-}")
NANOCHAT_DATASETS_DIR=$(absolute_path NANOCHAT_DATASETS_DIR "${NANOCHAT_DATASETS_DIR:-}")
NANOCHAT_EVAL_BUNDLE=$(absolute_path NANOCHAT_EVAL_BUNDLE "${NANOCHAT_EVAL_BUNDLE:-}")
NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$default_base}"
mkdir -p "$NANOCHAT_BASE_DIR/speedrun" || fail "cannot write to $NANOCHAT_BASE_DIR: set NANOCHAT_BASE_DIR"
NANOCHAT_BASE_DIR=$(absolute_path NANOCHAT_BASE_DIR "$NANOCHAT_BASE_DIR")
export NANOCHAT_DATA_DIR NANOCHAT_DATASETS_DIR NANOCHAT_EVAL_BUNDLE NANOCHAT_BASE_DIR
state="$NANOCHAT_BASE_DIR/speedrun"  # what was decided, and which stages were started and finished
if command -v flock >/dev/null; then
  exec 8>"$state/lock"
  flock --timeout 5 8 ||  # a stage that was just killed may take a moment to end
    fail "another speedrun is using $NANOCHAT_BASE_DIR: wait for it, or set NANOCHAT_BASE_DIR"
fi
source "$(dirname "${BASH_SOURCE[0]}")/runs/setup.sh"
if [ -n "${WANDB_RUN:-}" ] && [ -z "${NANOCHAT_VENV:-}" ]; then
  pip install -qq --disable-pip-version-check -c constraints.txt wandb
fi

# ---- decide once: a restart must not decide differently because the network is down or a GPU is busy ----

online() {  # succeeds if the hub responds, even with an error
  python - >/dev/null 2>&1 <<'P'
import os, urllib.error, urllib.request

try:
    urllib.request.urlopen(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=5)
except urllib.error.HTTPError:
    pass
P
}

decide() {  # prints: device, number of GPUs, dtype ("-" = the default), pretraining text, chat datasets
  local facts device gpus dtype data datasets
  facts=$(python -m nanochat.hardware)
  read -r device gpus dtype <<<"$facts"
  for power in 8 4 2 1; do  # batch sizes are powers of two
    if [ "$gpus" -ge "$power" ]; then gpus=$power; break; fi
  done
  if [ "$speedrun" = tiny ]; then data=primer
  elif [ -n "$NANOCHAT_DATA_DIR" ]; then data=given
  elif [ "$device" = cuda ] && online; then data=public
  else data=primer; fi
  if [ "$speedrun" = tiny ]; then datasets=primer
  elif [ -n "$NANOCHAT_DATASETS_DIR" ]; then datasets=mirror
  elif [ "$data" != primer ] && online; then datasets=hub
  else datasets=primer; fi
  echo "$device $gpus ${NANOCHAT_DTYPE:-$dtype} $data $datasets"
}

asked="$NANOCHAT_DATA_DIR|$NANOCHAT_DATASETS_DIR|${NANOCHAT_DTYPE:-}${speedrun:+|$speedrun}"
if [ "$(cat "$state/asked" 2>/dev/null || true)" != "$asked" ] || [ ! -s "$state/decided" ]; then
  decided=$(decide)
  if [ -s "$state/decided" ] && [ "$(cat "$state/decided")$(cat "$state/asked")" != "$decided$asked" ]; then
    echo "the settings differ from those of the last run: all stages run again"
  fi
  rm -f "$state"/*.done "$state"/*.started
  echo "$decided" >"$state/decided"
  echo "$asked" >"$state/asked"
else
  echo "as decided at the first start (remove $state to decide again):"
fi
read -r device gpus dtype data datasets <"$state/decided"

if [ "$device" = cuda ]; then echo "machine: $gpus CUDA GPU(s)"; else echo "machine: $device"; fi
if [ "$dtype" != - ]; then
  reason="this CPU multiplies it faster than float32"
  if [ -n "${NANOCHAT_DTYPE:-}" ]; then reason="from NANOCHAT_DTYPE"; fi
  echo "dtype:   $dtype ($reason)"
  export NANOCHAT_DTYPE=$dtype
fi
case "$data" in
  given) echo "text:    $NANOCHAT_DATA_DIR (from NANOCHAT_DATA_DIR)" ;;
  public) echo "text:    the public shards (this machine has a GPU and a network)" ;;
  primer)
    reason="no GPU or no network, and NANOCHAT_DATA_DIR is not set"
    if [ "$speedrun" = tiny ]; then reason="NANOCHAT_SPEEDRUN=tiny"; fi
    echo "text:    the embedded corpus ($reason)"
    export NANOCHAT_DATA_DIR="$NANOCHAT_BASE_DIR/primer" ;;
esac
case "$datasets" in
  mirror) echo "chat:    $NANOCHAT_DATASETS_DIR (from NANOCHAT_DATASETS_DIR)" ;;
  hub) echo "chat:    the public datasets" ;;
  primer) echo "chat:    the embedded conversations" ;;
esac

# ---- sizes ----

train=(python -m)
vocab=32768 shards=170 eval_tokens=41943040 save_every=250
if [ "$speedrun" = tiny ]; then
  vocab=1024 eval_tokens=8192 save_every=10
  size=(--depth 2 --head-dim 64 --max-seq-len 256 --device-batch-size 8 --total-batch-size 2048 --num-iterations 40
        --eval-every 0 --no-compile)
elif [ "$data" = primer ]; then
  vocab=2048 eval_tokens=65536
  size=(--depth 4 --head-dim 64 --max-seq-len 512 --device-batch-size 8 --total-batch-size 4096 --num-iterations 640
        --eval-every 0)
elif [ "$device" = cuda ]; then
  train=(torchrun --standalone --nproc_per_node="$gpus" -m)
  case "$gpus" in  # the depth that trains within a few hours
    8) size=(--depth 24 --target-param-data-ratio 8 --device-batch-size 16) ;;
    4) size=(--depth 20 --device-batch-size 16) ;;
    2) size=(--depth 16 --device-batch-size 16) shards=80 ;;
    *) size=(--depth 12 --device-batch-size 16) shards=40 ;;
  esac
else
  vocab=8192 eval_tokens=524288
  size=(--depth 4 --head-dim 64 --max-seq-len 512 --device-batch-size 16 --total-batch-size 8192 --num-iterations 500)
fi

sft=()
tasks=(-a ARC-Easy,ARC-Challenge,MMLU,GSM8K,HumanEval,SpellingBee)  # the six tasks of ChatCORE
if [ "$datasets" = primer ]; then
  sft=(--smoltalk-epochs 0 --mmlu-epochs 0 --gsm8k-epochs 0 --simplespelling-epochs 0 --spellingbee-epochs 0
       --identity-epochs 0 --primer-epochs 3)
  tasks=(-a QuizFree,QuizChoice,Sums -m 64)
elif [ "$device" != cuda ]; then  # 250 optimizer steps: spelling tasks would take up most of them
  sft=(--num-iterations 250 --identity-epochs 10 --simplespelling-epochs 0 --spellingbee-epochs 0)
  tasks+=(-x 200)
fi
questions=("What is the capital of France?" "What is 47 + 85?" "Who are you?")
if [ "$speedrun" = tiny ]; then
  sft+=(--num-iterations 20 --eval-examples 32 --no-compile)
  tasks+=(-x 16)
  questions=("What is the capital of France?")
fi
evals=bpb,sample
if [ "$data" = public ] || [ -n "$NANOCHAT_EVAL_BUNDLE" ]; then evals=core,$evals; fi
echo "model:   ${size[*]}"

# ---- run the stages ----

stage() {  # stage NAME COMMAND…: runs the command unless it has succeeded before
  local name=$1
  shift
  if [ -f "$state/$name.done" ]; then
    echo "== $name: skipped, finished before"
    return
  fi
  touch "$state/$name.started"
  echo "== $name: $*"
  local start=$SECONDS
  "$@"
  touch "$state/$name.done"
  echo "== $name took $((SECONDS - start)) s"
}

resume() { [ ! -f "$state/$1.started" ] || echo --resume; }  # if the stage was started with the same settings

run=(${WANDB_RUN:+--run "$WANDB_RUN"})
checkpoints=(--model-tag speedrun --save-every "$save_every" --keep-last 1)
case "$data" in
  primer) stage data python -m scripts.primer --data-dir "$NANOCHAT_DATA_DIR" ;;
  public) stage data python -m nanochat.dataset -n "$shards" ;;
esac
stage tok_train python -m scripts.tok_train --vocab-size "$vocab"
stage tok_eval python -m scripts.tok_eval
stage base_train "${train[@]}" scripts.base_train "${size[@]}" --eval-tokens "$eval_tokens" "${checkpoints[@]}" \
  $(resume base_train) "${run[@]}"
stage base_eval "${train[@]}" scripts.base_eval -g speedrun --eval "$evals" --max-per-task 500 \
  --split-tokens "$eval_tokens"
stage chat_sft "${train[@]}" scripts.chat_sft --base-tag speedrun "${sft[@]}" "${checkpoints[@]}" \
  $(resume chat_sft) "${run[@]}"
stage chat_eval "${train[@]}" scripts.chat_eval -i sft -g speedrun "${tasks[@]}"

# ---- show the results ----

python -m scripts.report
for question in "${questions[@]}"; do
  echo "> $question"
  python -m scripts.chat_cli -g speedrun -t 0 -p "$question"
done
chat="python -m scripts.chat_cli"
if [ "$NANOCHAT_BASE_DIR" != "$HOME/.cache/nanochat" ]; then chat="NANOCHAT_BASE_DIR=$NANOCHAT_BASE_DIR $chat"; fi
echo "done in $((SECONDS - started)) s. Chat with the model:  source ${NANOCHAT_VENV:-.venv}/bin/activate && $chat"
