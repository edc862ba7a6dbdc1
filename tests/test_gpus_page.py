"""
docs/gpus.md shows the rows per pass that the planner chooses. tests/test_null_gpu.py checks the other table.

    python -m pytest tests/test_gpus_page.py
"""

import sys
from pathlib import Path

from nanochat.cards import find_machine

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "dev"))
import gpu_choices  # noqa: E402

PAGE = (ROOT / "docs/gpus.md").read_text(encoding="utf-8")


def test_page_shows_the_rows_that_the_planner_chooses():
    table = "\n".join(gpu_choices.batch_table())
    assert table in PAGE, f"docs/gpus.md is out of date, the table is now:\n{table}"


def test_page_has_a_row_of_choices_for_every_card():
    for name in gpu_choices.CARDS:
        major, minor = find_machine(name).card.capability
        assert f"\n| {name} | {major}.{minor} |" in PAGE
