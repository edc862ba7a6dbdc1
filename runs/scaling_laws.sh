#!/usr/bin/env bash
# Scaling laws: trains models of several depths with several FLOP budgets, to find the best depth for each budget.
#
#   bash runs/scaling_laws.sh                                      # the full grid
#   BUDGETS="1e14 3e14" DEPTHS="2 4 6" OPTIONS="--head-dim 64 --max-seq-len 512" bash runs/scaling_laws.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
detect_machine

for budget in ${BUDGETS:-1e18 3e18 1e19 3e19}; do
  for depth in ${DEPTHS:-8 10 12 14 16 18 20}; do
    # shellcheck disable=SC2086  # OPTIONS is a list of words
    "${train[@]}" scripts.base_train --depth "$depth" --target-flops "$budget" --model-tag "flops-$budget-d$depth" \
      --eval-every 0 --sample-every -1 --resume ${OPTIONS:-}
  done
done
python - <<'P'
import json
from nanochat.logging import report_dir

print("FLOPs\tdepth\ttokens\tbits per byte")
rows = []
for path in (report_dir() / "metrics").glob("base_train-flops-*.jsonl"):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    config = lines[0]["config"]
    bits_per_byte = [line["val/bpb"] for line in lines if "val/bpb" in line]
    if bits_per_byte:
        flags = config["flags"]
        rows.append((flags["target_flops"], flags["depth"], config["recipe"]["horizon"], bits_per_byte[-1]))
for flops, depth, tokens, bpb in sorted(rows):
    print(f"{flops:.0e}\t{depth}\t{tokens}\t{bpb:.4f}")
P
