#!/usr/bin/env bash
# The full pipeline: environment, tokenizer, pretraining, fine-tuning, evaluation, and a few questions to the new model.
#
#   bash speedrun.sh                                      # sized to this machine
#   bash speedrun.sh --plan                               # print what it would do, for how long; no data is loaded
#   bash speedrun.sh --plan --for 8xH100                  # the same for another machine
#   NANOCHAT_SPEEDRUN=tiny bash speedrun.sh               # all stages at toy size, in one or two minutes on two cores
#   NANOCHAT_DATA_DIR=~/texts bash speedrun.sh            # pretrain on your text: .txt, .md, .jsonl, … or parquet shards
#   NANOCHAT_DATASETS_DIR=~/hub bash speedrun.sh          # GSM8K, MMLU, … from a local mirror of the hub
#   NANOCHAT_EVAL_BUNDLE=~/eval_bundle bash speedrun.sh   # evaluate CORE too, from a folder with its tasks
#   NANOCHAT_FP8=0 bash speedrun.sh                       # train in bfloat16 also where the GPU has FP8 units
#   WANDB_RUN=first bash speedrun.sh                      # log to wandb
#   NANOCHAT_VENV=~/venv bash speedrun.sh                 # use this environment instead of setting up .venv
#
# Everything is written to NANOCHAT_BASE_DIR (default ~/.cache/nanochat; tiny: ~/.cache/nanochat-tiny). After an
# interruption run the same command again: finished stages are skipped, the unfinished one resumes from its checkpoint.
# scripts/speedrun.py chooses text, datasets and sizes at the first start; a restart uses the same.
# shellcheck disable=SC1091,SC2046,SC2154  # sourced files set the arrays; resume prints one word or none
set -euo pipefail
started=$SECONDS
source "$(dirname "${BASH_SOURCE[0]}")/runs/setup.sh"

fail() { echo "error: $1" >&2; exit 1; }

# ---- plan ----

export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat${NANOCHAT_SPEEDRUN:+-tiny}}"
case "$NANOCHAT_BASE_DIR" in /*) ;; *) NANOCHAT_BASE_DIR="$start_dir/$NANOCHAT_BASE_DIR" ;; esac
if [ $# -gt 0 ]; then exec python -m scripts.speedrun --start-dir "$start_dir" "$@"; fi

state="$NANOCHAT_BASE_DIR/speedrun"  # what was decided, and which stages were started and finished
mkdir -p "$state" 2>/dev/null || fail "cannot write to $NANOCHAT_BASE_DIR: set NANOCHAT_BASE_DIR"
if command -v flock >/dev/null; then
  exec 8>>"$state/lock"
  if ! flock --timeout 15 8; then  # a stage that was just stopped may still be saving
    pids=$(cat "$state/lock")
    fail "another speedrun is using $NANOCHAT_BASE_DIR: wait for it, stop it with 'kill $pids', or set NANOCHAT_BASE_DIR"
  fi
  echo $$ > "$state/lock"
fi
if [ -n "${WANDB_RUN:-}" ] && [ -z "${NANOCHAT_VENV:-}" ]; then
  pip install -qq --disable-pip-version-check -c constraints.txt wandb 8>&-
fi
python -m scripts.speedrun --start-dir "$start_dir" 8>&-
source "$state/stages.sh"  # sets the arrays data, launch, tok_train, base_train, …, questions

# ---- run the stages ----

stage_pid=""
stop() {  # the stage saves a checkpoint if it trains; the same command then resumes it
  trap - TERM INT HUP
  if [ -n "$stage_pid" ]; then
    kill -TERM "$stage_pid" 2>/dev/null || true
    wait "$stage_pid" || true
  fi
  echo "stopped: run the same command again to continue" >&2
  exit 143
}
trap stop TERM INT HUP

bound=()  # a prefix with which the stage gets SIGTERM when this shell is killed
if setpriv --pdeathsig TERM true 2>/dev/null; then bound=(setpriv --pdeathsig TERM); fi

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
  # In the background, because bash handles signals only between foreground commands. The stage keeps the lock (8): it
  # holds as long as anything works in this folder, also if only this shell is killed.
  ${bound[@]+"${bound[@]}"} "$@" < /dev/null &
  stage_pid=$!
  echo "$$ $stage_pid" > "$state/lock"
  wait "$stage_pid"
  stage_pid=""
  touch "$state/$name.done"
  echo "== $name took $((SECONDS - start)) s"
}

resume() { [ ! -f "$state/$1.started" ] || echo --resume; }  # prints --resume if the stage was started before

if [ ${#data[@]} -gt 0 ]; then stage data "${data[@]}"; fi
stage tok_train python -m scripts.tok_train "${tok_train[@]}"
stage tok_eval python -m scripts.tok_eval
stage base_train "${launch[@]}" scripts.base_train "${base_train[@]}" $(resume base_train)
stage base_eval "${launch[@]}" scripts.base_eval "${base_eval[@]}"
stage chat_sft "${launch[@]}" scripts.chat_sft "${chat_sft[@]}" $(resume chat_sft)
stage chat_eval "${launch[@]}" scripts.chat_eval "${chat_eval[@]}"

# ---- show the results ----

python -m scripts.report 8>&-
python -m scripts.chat_cli -g speedrun -t 0 "${questions[@]}" 8>&-
chat="python -m scripts.chat_cli"
if [ "$NANOCHAT_BASE_DIR" != "$HOME/.cache/nanochat" ]; then chat="NANOCHAT_BASE_DIR=$NANOCHAT_BASE_DIR $chat"; fi
echo "done in $((SECONDS - started)) s. Chat with the model:  source ${NANOCHAT_VENV:-.venv}/bin/activate && $chat"
