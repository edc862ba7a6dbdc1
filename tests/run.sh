#!/usr/bin/env bash
# Everything that must hold before a change lands: lint, types, tests.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../runs/setup.sh"
ruff check .
mypy
if command -v cargo >/dev/null; then
  (cd rustbpe && cargo fmt --check && cargo clippy -q --offline --all-targets -- -D warnings && cargo test -q --offline)
else
  echo "no cargo: the Rust code is not checked"
fi
python -m pytest -q "$@"
