"""
Measures a part of nanochat beside what it replaces or competes with: a table, and last a line of JSON with `ratios`
(name → how many times better than the baseline).

    python -m scripts.bench tokenizer               # a benchmark is scripts/bench_NAME.py
    python -m scripts.bench tokenizer --help        # its flags
"""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(argv: Sequence[str] | None = None) -> Any:
    argv = sys.argv[1:] if argv is None else argv
    names = sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))
    if not argv or argv[0] not in names:
        raise SystemExit(f"usage: python -m scripts.bench NAME [flags], where NAME is one of: {', '.join(names)}")
    return importlib.import_module(f"scripts.bench_{argv[0]}").main(argv[1:])


if __name__ == "__main__":
    main()
