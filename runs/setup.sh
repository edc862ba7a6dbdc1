# shellcheck shell=bash disable=SC1091,SC2034  # the scripts that source this file use what it sets
# Sets up the environment for the scripts that source this file: a virtual environment in .venv, with every package at
# the version of constraints.txt. Does nothing when .venv is up to date: then the clone may be read-only.
#
# NANOCHAT_VENV=~/my-venv uses that environment instead; nothing is installed into it.

set -euo pipefail
start_dir=$PWD  # relative paths of the user start here
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -n "${HOME:-}" ] || unset HOME
export HOME=${HOME:-~}  # services and containers may lack it; then ~ is that of the user's entry in /etc/passwd
case "$HOME" in
  /*) ;;
  *) echo "error: HOME is not set, and the user has no home folder: set it" >&2; exit 1 ;;
esac

env_stamp() { cat pyproject.toml constraints.txt | cksum; }
rustbpe_stamp() { cat rustbpe/Cargo.* rustbpe/pyproject.toml rustbpe/src/* rustbpe/python/rustbpe/*.py | cksum; }

env_is_ready() { [ "$(cat .venv/stamp 2>/dev/null || true)" = "$(env_stamp)" ]; }
rustbpe_is_ready() { [ "$(cat .venv/stamp-rustbpe 2>/dev/null || true)" = "$(rustbpe_stamp)" ]; }

setup() {
  local python
  if ! env_is_ready; then
    python=$(command -v python3 || true)
    if [ -z "$python" ] || ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
      echo "error: Python 3.10 or newer is needed: install it, for example apt-get install python3 python3-venv" >&2
      return 1
    fi
    echo "setting up .venv ($("$python" --version), a minute or two)"
    if ! "$python" -m venv .venv; then
      echo "error: 'python3 -m venv' failed: apt-get install python3-venv, or remove .venv" >&2
      return 1
    fi
    if ! .venv/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'; then
      echo "error: the packages could not be installed, see above: connect to a network and run this again, or set" \
        "NANOCHAT_VENV to an environment that has them" >&2
      return 1
    fi
    install_flash_attention .venv/bin/python
    has_cargo || echo "no cargo: the published rustbpe wheel trains the tokenizer, ten times slower"
    rm -f .venv/stamp-rustbpe
    env_stamp > .venv/stamp
  fi
  if has_cargo; then
    build_rustbpe
  fi
}

install_flash_attention() {  # install_flash_attention PYTHON: FlashAttention-4, if all GPUs are Hopper or Blackwell
  local capabilities
  capabilities=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null || true)
  # 9.x and 10.x: the RTX 50 series (12.x) lacks the instructions that it is written for
  if [ -n "$capabilities" ] && ! grep -qvE '^ *(9|10)\.' <<<"$capabilities"; then
    "$1" -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[gpu]' ||
      echo "flash-attn-4 could not be installed, see above: torch's FlashAttention-2 trains about 3 % slower"
  fi
}

has_cargo() { cargo --version >/dev/null 2>&1; }  # rustup's cargo exists, and fails, without a toolchain

build_rustbpe() {  # replaces the published wheel by the crate in rustbpe/, if it is new or its sources have changed
  if ! rustbpe_is_ready; then
    echo "building rustbpe"
    .venv/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt cffi maturin
    PATH="$PWD/.venv/bin:$PATH" .venv/bin/python -m pip install -qq --disable-pip-version-check \
      --no-build-isolation --no-deps --force-reinstall ./rustbpe ||
      echo "rustbpe could not be built, see above: the published wheel trains the tokenizer, ten times slower"
    rustbpe_stamp > .venv/stamp-rustbpe
  fi
}

detect_machine() {  # sets ranks (the GPUs, 1 without any) and launch: the command that starts a stage on all of them
  ranks=$(python -m nanochat.hardware)
  launch=(python -m)
  if [ "$ranks" -gt 1 ]; then
    launch=(torchrun --standalone --nproc_per_node="$ranks" -m)
  fi
}

if [ -n "${NANOCHAT_VENV:-}" ]; then
  if [ ! -f "$NANOCHAT_VENV/bin/activate" ]; then
    echo "error: NANOCHAT_VENV is $NANOCHAT_VENV, which is not a virtual environment: create it, or unset NANOCHAT_VENV" >&2
    exit 1
  fi
elif env_is_ready && { ! command -v cargo >/dev/null || rustbpe_is_ready; }; then
  :
elif [ ! -w . ]; then
  echo "error: cannot write to $PWD, where .venv is to be set up: clone the repository into a folder of your own," \
    "or set NANOCHAT_VENV to an environment that has its packages" >&2
  exit 1
elif command -v flock >/dev/null; then  # if two scripts start at once, the second one waits
  exec 9>.setup.lock
  flock 9
  setup
  flock --unlock 9
  exec 9>&-
else
  setup
fi
source "${NANOCHAT_VENV:-.venv}/bin/activate"
