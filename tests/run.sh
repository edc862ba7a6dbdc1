#!/usr/bin/env bash
# Everything that must pass before a change is merged: lint, types, Rust and Python tests.
#
#   bash tests/run.sh
#   bash tests/run.sh -m "not slow"     # arguments go to pytest; this leaves out the slow tests (one or two minutes)
#   bash tests/run.sh -n 0 --pdb        # in one process: two are faster, but no debugger works in them
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../runs/setup.sh"
ruff check .
ruff format --check -q .
mypy
if command -v cargo >/dev/null; then
  (cd rustbpe && cargo fmt --check && cargo clippy -q --offline --all-targets -- -D warnings && cargo test -q --offline)
else
  echo "no cargo: the Rust code is not checked"
fi
# Two processes, each with one thread. The tests of a file share fixtures, so they run in one process.
export OMP_NUM_THREADS=1 GOMP_SPINCOUNT=3000
python -m pytest -q -n 2 --dist loadfile "$@"
