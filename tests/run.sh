#!/usr/bin/env bash
# Everything that must hold before a change lands: lint, types, tests.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../runs/setup.sh"
ruff check .
mypy
python -m pytest -q "$@"
