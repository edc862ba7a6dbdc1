#!/usr/bin/env bash
# Everything that must pass before a change is merged: lint, types, Rust and Python tests.
#
#   bash tests/run.sh
#   bash tests/run.sh -m "not slow"     # arguments go to pytest; this leaves out the slow tests (one or two minutes)
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
export GOMP_SPINCOUNT=3000  # as in scripts/__init__.py
python -m pytest -q "$@"
