#!/usr/bin/env bash
# Scaling laws: trains models of several depths with several FLOP budgets, one run per GPU, and finds the best number of
# parameters and of tokens for each budget, their power laws and charts (scripts/experiment.py).
#
#   bash runs/scaling_laws.sh                                      # the full grid
#   BUDGETS="1e14 3e14" DEPTHS="2 4 6" OPTIONS="--head-dim 64 --max-seq-len 512 --eval-tokens 65536" bash runs/scaling_laws.sh
#
# It needs shards and a tokenizer. 170 shards hold 5.8 B tokens: half of the models train on more, and read the text
# several times. 3,000 shards (300 GB) are enough for all but the smallest ones with the largest budget.
#   python -m nanochat.dataset -n 170
#   python -m scripts.tok_train
#
# The 28 models of the full grid take 26 hours and 615 dollars on 8xH100, 17 of the hours for 3e19 FLOPs (calculated).
# To calculate it for one model:
#   python -m scripts.base_train --plan --for 8xH100 --depth 20 --target-flops 3e19
# shellcheck disable=SC1091
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

budgets=${BUDGETS:-1e18 3e18 1e19 3e19}
depths=${DEPTHS:-8 10 12 14 16 18 20}
python -m scripts.experiment --name scaling-laws --flops "${budgets// /,}" --depths "${depths// /,}" --seeds 1 \
  --train-flags="${OPTIONS:-}"
