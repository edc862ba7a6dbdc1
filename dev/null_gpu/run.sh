#!/usr/bin/env bash
# Runs the tests of the CUDA path on the null GPU, which needs no GPU (dev/README.md explains it).
#
#   bash dev/null_gpu/run.sh                           # about a minute; the first time makes the environment
#   bash dev/null_gpu/run.sh -x -k capture             # arguments go to pytest
#   bash dev/null_gpu/run.sh -- bash dev/gpu_check.sh --dry-run      # any other command
#
# The environment is a virtual environment of Python 3.12 with torch 2.11 for CUDA 13: about 3 GB to fetch, 5 GB on
# disk, in NULLGPU_DIR (default ~/.cache/nanochat/null_gpu). It needs g++ and nm (apt-get install g++ binutils).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here/../.."
folder=${NULLGPU_DIR:-$HOME/.cache/nanochat/null_gpu}
venv=$folder/venv

fail() { echo "error: $1" >&2; exit 1; }

make_environment() {
  local python version
  [ "$(command -v g++ nm | wc -l)" = 2 ] || fail "g++ and nm are needed: apt-get install g++ binutils"
  python=$(command -v "${PYTHON:-python3.12}") || fail "Python 3.12 is needed: install it, or set PYTHON"
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || fail "$python does not run: set PYTHON"
  [ "$version" = 3.12 ] || fail "Python 3.12 is needed, $python is $version: set PYTHON"
  echo "making $venv: torch for CUDA, about 3 GB"
  mkdir -p "$folder"
  "$python" -m venv "$venv"
  # The project's packages at the versions of constraints.txt; torch and what comes with it are those of a GPU machine.
  grep -vE '^(torch|triton|nvidia|setuptools)' constraints.txt >"$folder/constraints.txt"
  "$venv/bin/python" -m pip install -q --disable-pip-version-check torch==2.11.0 setuptools
  "$venv/bin/python" - <<'P' >"$folder/requirements.txt"
import tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
print(*(name for name in project["dependencies"] if not name.startswith("torch")), "pytest", "hypothesis", sep="\n")
P
  "$venv/bin/python" -m pip install -q --disable-pip-version-check -c "$folder/constraints.txt" \
    -r "$folder/requirements.txt"
}

stamp=$(cat pyproject.toml constraints.txt | cksum)
if [ "$(cat "$folder/stamp" 2>/dev/null || true)" != "$stamp" ]; then
  make_environment
  echo "$stamp" >"$folder/stamp"
fi
stamp=$(cat "$here"/*.cpp "$here/build.sh" | cksum)
if [ "$(cat "$folder/stamp-libraries" 2>/dev/null || true)" != "$stamp" ]; then
  bash "$here/build.sh" "$venv" "$folder/lib"
  echo "$stamp" >"$folder/stamp-libraries"
fi

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PATH="$venv/bin:$PATH" PYTHON="$venv/bin/python"
export NULLGPU_DEVICES="${NULLGPU_DEVICES:-2}" TORCHINDUCTOR_COMPILE_THREADS="${TORCHINDUCTOR_COMPILE_THREADS:-1}"
# Inductor's timings are noise here: what it caches must not reach a real GPU.
export TORCHINDUCTOR_CACHE_DIR="$folder/inductor" TRITON_CACHE_DIR="$folder/triton"
if [ "${1:-}" = -- ]; then
  exec "$folder/lib/with" "${@:2}"
fi
# Triton's interpreter computes on the CPU, so these tests see numbers.
[ $# != 0 ] || TRITON_INTERPRET=1 python -m pytest -q -p no:cacheprovider tests/test_mlp.py
exec "$folder/lib/with" python -m pytest -q -p no:cacheprovider tests/test_null_gpu.py "$@"
