"""
docs/scaling.md shows what dev/scaling.py calculates.

    python -m pytest tests/test_scaling_page.py
"""

import sys
from pathlib import Path

import pytest

from nanochat import recipe
from nanochat.costs import bytes_communicated

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "dev"))
import scaling  # noqa: E402

PAGE = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("sharded", [False, True])
def test_page_shows_the_calculated_table(sharded):
    text = "\n".join(scaling.table(sharded))
    assert text in PAGE, f"docs/scaling.md is out of date, the table is now:\n{text}"


def test_network_time_is_that_of_the_slowest_link():
    sent = {"gradients": 50e9, "Muon": 50e9}
    assert scaling.network_seconds(sent, 8) == pytest.approx({"gradients": 50 / 360, "Muon": 50 / 360})
    two_nodes = scaling.network_seconds(sent, 16)
    assert two_nodes["gradients"] == pytest.approx(1)  # a ring crosses the link once
    assert two_nodes["Muon"] == pytest.approx(8 * 8 / 15)  # each of 8 GPUs sends to 8 of 15 others through the link


def test_transfers_of_sharded_weights_hide_behind_the_passes():
    plan = recipe.derive(recipe.RecipeFlags(depth=24), scaling.VOCAB_SIZE)
    for sharded in (False, True):
        setup = scaling.find_setup(plan, 8, sharded)
        network = sum(scaling.network_seconds(bytes_communicated(plan.model, setup), 8).values())
        exposed = scaling.step_seconds(plan, setup) - scaling.compute_seconds(plan, setup)
        assert (exposed < network / 2) if sharded else (exposed == pytest.approx(network))
