#!/usr/bin/env bash
# Scaling laws: trains models of several depths with several FLOP budgets, to find the best depth for each budget.
#
#   bash runs/scaling_laws.sh                                      # the full grid
#   BUDGETS="1e14 3e14" DEPTHS="2 4 6" OPTIONS="--head-dim 64 --max-seq-len 512 --eval-tokens 65536" bash runs/scaling_laws.sh
#   python -m scripts.scaling_laws                                 # the table so far
#
# It needs shards and a tokenizer. 170 shards hold 5.8 B tokens: half of the models train on more, and read the text
# several times. 3,000 shards (300 GB) are enough for all but the smallest ones with the largest budget.
#   python -m nanochat.dataset -n 170
#   python -m scripts.tok_train
#
# The 28 models of the full grid take 26 hours and 615 dollars on 8xH100, 17 of the hours for 3e19 FLOPs (calculated).
# To calculate it for one model:
#   python -m scripts.base_train --plan --for 8xH100 --depth 20 --target-flops 3e19
# shellcheck disable=SC1091,SC2086,SC2154  # OPTIONS is a list of words; setup.sh sets launch
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
detect_machine

for budget in ${BUDGETS:-1e18 3e18 1e19 3e19}; do
  for depth in ${DEPTHS:-8 10 12 14 16 18 20}; do
    "${launch[@]}" scripts.base_train --depth "$depth" --target-flops "$budget" --model-tag "flops-$budget-d$depth" \
      --eval-every 0 --sample-every -1 --resume ${OPTIONS:-}
  done
done
python -m scripts.scaling_laws
