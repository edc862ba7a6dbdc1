# The environment, for the scripts that source this: a virtual environment in .venv with everything installed at the
# versions of constraints.txt. Does nothing when it is there and up to date.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

setup() {
  local python stamp
  stamp=$(cat pyproject.toml constraints.txt | cksum)
  if [ "$(cat .venv/stamp 2>/dev/null || true)" != "$stamp" ]; then
    python=$(command -v python3 || true)
    if [ -z "$python" ] || ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
      echo "error: Python 3.10 or newer is needed: install it, e.g. apt-get install python3 python3-venv" >&2
      return 1
    fi
    echo "setting up .venv ($("$python" --version), a minute or two)"
    if ! "$python" -m venv .venv; then
      echo "error: 'python3 -m venv' does not work here: apt-get install python3-venv, or remove .venv" >&2
      return 1
    fi
    .venv/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
    command -v cargo >/dev/null || echo "no cargo: the published rustbpe wheel trains the tokenizer, ten times slower"
    rm -f .venv/stamp-rustbpe
    echo "$stamp" > .venv/stamp
  fi
  if command -v cargo >/dev/null; then
    build_rustbpe
  fi
}

build_rustbpe() {  # replaces the published wheel by our crate, again whenever its sources change
  local stamp
  stamp=$(cat rustbpe/Cargo.* rustbpe/pyproject.toml rustbpe/src/* rustbpe/python/rustbpe/*.py | cksum)
  if [ "$(cat .venv/stamp-rustbpe 2>/dev/null || true)" != "$stamp" ]; then
    echo "building rustbpe"
    .venv/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt cffi maturin
    PATH="$PWD/.venv/bin:$PATH" .venv/bin/python -m pip install -qq --disable-pip-version-check \
      --no-build-isolation --no-deps --force-reinstall ./rustbpe ||
      echo "rustbpe could not be built, see above: the published wheel trains the tokenizer, ten times slower"
    echo "$stamp" > .venv/stamp-rustbpe
  fi
}

if command -v flock >/dev/null; then  # two at once: the second waits
  exec 9>.setup.lock
  flock 9
  setup
  flock --unlock 9
  exec 9>&-
else
  setup
fi
source .venv/bin/activate

# Threads that wait spin for 40 µs, then sleep. On two cores (depth 4, compiled, tokens/s, medians): alone 7,800, always
# asleep (OMP_WAIT_POLICY=PASSIVE) 7,500, as OpenMP would have it 7,300; beside another busy process 4,100, 4,400, and
# 2,700 already with ten times the spinning.
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-3000}"
