"""
docs/time_to_gpt2.md shows what dev/time_to_gpt2.py calculates, and that is close to what public runs took.

    python -m pytest tests/test_time_to_gpt2.py
"""

import sys
from pathlib import Path

import pytest

from nanochat.cli import parse
from nanochat.recipe import RecipeFlags, model_config
from scripts import base_train, speedrun

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "dev"))
import time_to_gpt2  # noqa: E402
from time_to_gpt2 import OURS, PUBLIC_RUNS, minutes, overhead  # noqa: E402

PAGE = (ROOT / "docs/time_to_gpt2.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["validation_table", "step_table", "result_table", "lever_table"])
def test_page_shows_the_calculated_table(name):
    text = "\n".join(getattr(time_to_gpt2, name)())
    assert text in PAGE, f"docs/time_to_gpt2.md is out of date, the table is now:\n{text}"


@pytest.mark.parametrize("run", PUBLIC_RUNS, ids=lambda run: run.name)
def test_public_runs_are_predicted_within_10_percent(run):
    assert minutes(run) == pytest.approx(run.minutes, rel=0.10)  # without any factor that is fitted to them
    assert overhead() * minutes(run) == pytest.approx(run.minutes, rel=0.05)


def test_our_run_is_the_recipe_of_the_speedrun():
    decisions = speedrun.decide(
        speedrun.Settings(), speedrun.Facts("cuda", 8, "H100", has_fp8=True, online=True), Path("/base")
    )
    flags = parse(base_train.Flags, decisions.base_train)
    assert flags.fp8 and decisions.vocab_size == OURS.vocab_size
    assert speedrun.derive(flags, decisions.vocab_size) == OURS.recipe
    assert OURS.setup.accumulation == 1


@pytest.mark.parametrize(
    "depth, vocab_size, fp8, measured", [(12, 32768, False, 12.65), (22, 49152, True, 69.0)], ids=["d12", "d22"]
)
def test_optimizer_on_one_gpu_takes_the_measured_time(depth, vocab_size, fp8, measured):
    config = model_config(RecipeFlags(depth=depth), vocab_size)
    assert time_to_gpt2.optimizer_ms(config, 1, fp8) == pytest.approx(measured, rel=0.01)
    assert time_to_gpt2.optimizer_ms(config, 8, fp8) < measured / 2


def test_orthogonalization_costs_what_its_products_cost():
    config = model_config(RecipeFlags(depth=1), 1024)  # one head of 128 channels
    C = config.n_embd
    flops = 0
    for rows, columns, count in ((C, C, 4), (C, 4 * C, 2)):
        flops += count * 5 * (2 * rows * rows * columns + 2 * rows**3 + 2 * rows * rows * columns)
    assert time_to_gpt2.muon_flops(config) == flops
