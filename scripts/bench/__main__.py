"""
Benchmarks: compare parts of nanochat with the usual code for the same task, or with other libraries.

    python -m scripts.bench tokenizer               # or checkpoint, core, infer, memory, rollout, serve, train
    python -m scripts.bench tokenizer --help        # its flags

Each prints a table and, as its last line, a JSON object. Its `ratios` are how many times better nanochat is than each
baseline.
"""

import importlib
import sys
from collections.abc import Sequence
from typing import Any

NAMES = ("checkpoint", "core", "infer", "memory", "rollout", "serve", "tokenizer", "train")


def main(argv: Sequence[str] | None = None) -> Any:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in NAMES:
        raise SystemExit(f"usage: python -m scripts.bench NAME [flags], where NAME is one of: {', '.join(NAMES)}")
    return importlib.import_module(f"scripts.bench.{argv[0]}").main(argv[1:])


if __name__ == "__main__":
    main()
