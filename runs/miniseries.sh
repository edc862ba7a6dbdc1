#!/usr/bin/env bash
# A miniseries: one compute-optimal model per depth, to see how the recipe scales (scripts/experiment.py), and CORE of
# each.
#
#   bash runs/miniseries.sh
#   DEPTHS="2 3 4" OPTIONS="--head-dim 64 --max-seq-len 512 --eval-tokens 65536" bash runs/miniseries.sh
#
# It needs shards and a tokenizer:
#   python -m nanochat.dataset -n 170
#   python -m scripts.tok_train
#
# The six depths take 2.4 hours and 58 dollars of training on 8xH100 (calculated; validation and evaluation take
# additional time). To calculate it for one depth:
#   python -m scripts.base_train --plan --for 8xH100 --depth 20
# shellcheck disable=SC1091,SC2154  # setup.sh sets launch and ranks
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
detect_machine

depths=${DEPTHS:-10 12 14 16 18 20}
python -m scripts.experiment --name miniseries --depths "${depths// /,}" --seeds 1 --gpus-per-run "$ranks" \
  --keep-checkpoints --train-flags="${OPTIONS:-}"
for depth in $depths; do
  "${launch[@]}" scripts.base_eval -g "miniseries-baseline-d$depth-s1"
done
