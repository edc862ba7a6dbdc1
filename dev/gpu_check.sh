#!/usr/bin/env bash
# Checks the project on one CUDA GPU in at most eight minutes: kernels, losses, speed, memory, engine, server, stages.
#
#   bash dev/gpu_check.sh              # all parts; called again: only those that have not passed
#   bash dev/gpu_check.sh 4 9          # these parts
#   bash dev/gpu_check.sh --dry-run    # toy sizes, in minutes: on a CPU, or on the null GPU (dev/null_gpu)
#
# It prints a table for dev/gpu.md and keeps it, with results.json and a log per part, in --out (default
# $NANOCHAT_BASE_DIR/gpu_check). PYTHON=… names the interpreter; default .venv/bin/python, else python3.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-}
if [ -z "$python" ]; then
  python=python3
  if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
fi

# Without a network, packages travel as wheels. This needs torch and numpy; the parts that need another one fail, and
# can be repeated when it is there. Not needed: fastapi, uvicorn, datasets.
missing=$("$python" - torch numpy tiktoken rustbpe safetensors pyarrow rich prompt_toolkit wcwidth pytest <<'P'
import importlib.util
import sys

specs = {name: importlib.util.find_spec(name) for name in sys.argv[1:]}
print(*(name for name, spec in specs.items() if not spec or not spec.origin))  # rustbpe/ is also a folder here
P
)
if [ -n "$missing" ]; then
  echo "missing: $missing. Where there is a network: python3 -m pip download --no-deps --only-binary=:all:" \
    "--python-version 3.12 --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 -d wheels $missing;" \
    "here: $python -m pip install --no-index --no-deps --target site wheels/*.whl && PYTHONPATH=\$PWD/site bash $0" >&2
fi
case " $missing " in *" torch "* | *" numpy "*) exit 1 ;; esac
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" exec "$python" dev/gpu_check.py "$@"
