#!/usr/bin/env bash
# A miniseries: one compute-optimal model per depth, to see how the recipe scales.
#
#   bash runs/miniseries.sh
#   DEPTHS="2 3 4" OPTIONS="--head-dim 64 --max-seq-len 512 --device-batch-size 8" bash runs/miniseries.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
detect_machine

for depth in ${DEPTHS:-10 12 14 16 18 20}; do
  # shellcheck disable=SC2086  # OPTIONS is a list of words
  "${train[@]}" scripts.base_train --depth "$depth" --model-tag "mini-d$depth" --eval-every 0 --resume ${OPTIONS:-}
  "${train[@]}" scripts.base_eval -g "mini-d$depth"
done
