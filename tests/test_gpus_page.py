"""
docs/gpus.md shows what the code chooses and what dev/estimates.py expects. tests/test_null_gpu.py checks the table of
choices.

    python -m pytest tests/test_gpus_page.py
"""

import sys
from pathlib import Path

import pytest

from nanochat.cards import find_machine
from nanochat.recipe import RecipeFlags, model_config

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "dev"))
import estimates  # noqa: E402
import gpu_choices  # noqa: E402

PAGE = (ROOT / "docs/gpus.md").read_text(encoding="utf-8")


def test_page_shows_the_rows_that_the_planner_chooses():
    table = "\n".join(gpu_choices.batch_table())
    assert table in PAGE, f"docs/gpus.md is out of date, the table is now:\n{table}"


def test_page_has_a_row_of_choices_for_every_card():
    for name in gpu_choices.CARDS:
        major, minor = find_machine(name).card.capability
        assert f"\n| {name} | {major}.{minor} |" in PAGE


def test_page_shows_the_estimates():
    for table in (estimates.training_table(), estimates.decode_table()):
        text = "\n".join(table)
        assert text in PAGE, f"docs/gpus.md is out of date, the table is now:\n{text}"


def test_attention_computes_whole_tiles():
    config = model_config(RecipeFlags(depth=1, max_seq_len=512, window_pattern="L"), 1024)
    num_tiles = 1 + 2 + 3 + 4  # rows of 128 queries, up to the diagonal
    flops = 3.5 * 4 * config.n_embd * 128 * 128 * num_tiles
    assert estimates.attention_flops(config, rows=2) == pytest.approx(2 * flops)


def test_faster_kernels_make_the_estimate_shorter():
    config = model_config(RecipeFlags(depth=24), 32768)
    plain, fp8 = (estimates.training_ms(config, 16, fp8=use_fp8) for use_fp8 in (False, True))
    fa4 = estimates.training_ms(config, 16, attention="fa4")
    assert fa4["attention"] < plain["attention"] / 1.5 and fa4["loss"] == plain["loss"]
    assert fp8["matrix products"] < plain["matrix products"]
    assert fp8["norms, rotary, relu²"] > plain["norms, rotary, relu²"]  # the casts
    # Without overheads, MFU would be the rate of the products.
    ms = estimates.training_ms(config, 16)["matrix products"]
    assert estimates.mfu(config, 16, ms) > 0.6


# Compiled, 32 rows, fa4, on an H100: docs/gpus.md. The gradients of depth 22 were not added to a sum.
@pytest.mark.parametrize(
    "depth, vocab_size, fp8, measured",
    [(12, 32768, False, (112.9, 58.65, 14.2)), (22, 49152, True, (405.8, 186.0, 48.5))],
    ids=["d12", "d22"],
)
def test_measured_micro_batch_is_estimated_within_2_percent(depth, vocab_size, fp8, measured):
    config = model_config(RecipeFlags(depth=depth), vocab_size)
    parts = estimates.training_ms(config, 32, attention="fa4", fp8=fp8)
    total = sum(parts.values()) - estimates.sum_ms(config) * fp8
    assert (total, parts["matrix products"], parts["attention"]) == pytest.approx(measured, rel=0.02)
