"""
The plan of a run: the machines, what fits, --plan, --hours and --budget, and what happens when memory runs out.

    python -m pytest tests/test_planner.py
"""

import re

import pytest

from nanochat import hardware, planner
from nanochat.cards import CARDS, find_card, find_machine
from nanochat.common import UserError
from nanochat.costs import GIB, TrainingSetup
from nanochat.recipe import RecipeFlags, derive, model_config
from scripts import base_train

VOCAB = 32768


@pytest.fixture
def base_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return tmp_path


# ---- machines ----


@pytest.mark.parametrize(
    "name, num_gpus, card",
    [("8xH100", 8, "H100"), ("1xa100-40", 1, "A100-40"), ("RTX4090", 1, "RTX4090"), ("t4", 1, "T4")],
)
def test_machine_is_found_by_name(name, num_gpus, card):
    machine = find_machine(name)
    assert (machine.num_gpus, machine.card.name) == (num_gpus, card)


@pytest.mark.parametrize("name", ["8xH1000", "0xH100", "H100x8", "x", "", "-1xH100"])
def test_unknown_machine_names_the_cards(name):
    with pytest.raises(UserError, match="as in 8xH100; cards: .*RTX4090"):
        find_machine(name)


def test_every_card_is_found_by_its_drivers_name():
    assert [find_card(f"NVIDIA {card.driver_name}") for card in CARDS] == list(CARDS)
    assert find_card("NVIDIA A100-SXM4-80GB").name == "A100-80"
    assert find_card("Tesla T4").name == "T4"
    assert find_card("NVIDIA Abacus") is None


def test_fp8_needs_a_card_that_has_it():
    assert planner.named_target("1xH100", fp8=True).rate_of(model_config(RecipeFlags(depth=24), VOCAB)) > 500e12
    with pytest.raises(UserError, match="leave out --fp8"):
        planner.named_target("1xA100-80", fp8=True)


# ---- what fits ----


def check(name, flags, rows):
    config = model_config(flags, VOCAB)
    target = planner.named_target(name, fp8=False)
    planner.check_fits(config, TrainingSetup(rows=rows, dtype=target.dtype, world_size=target.count), target, flags)


def test_batch_that_does_not_fit_names_one_that_does():
    with pytest.raises(UserError, match=r"32 rows per pass need about \S+ GiB .* 76.2 GiB: use --device-batch-size 16"):
        check("8xH100", RecipeFlags(depth=24), rows=32)
    check("8xH100", RecipeFlags(depth=24), rows=16)


def test_model_that_does_not_fit_names_a_depth_that_does():
    with pytest.raises(UserError, match=r"use --depth \d+ or less") as error:
        check("1xRTX4090", RecipeFlags(depth=100), rows=1)
    depth = int(re.search(r"--depth (\d+)", str(error.value)).group(1))
    check("1xRTX4090", RecipeFlags(depth=depth), rows=1)
    with pytest.raises(UserError):
        check("1xRTX4090", RecipeFlags(depth=depth + 1), rows=1)


def test_depth_100_is_refused_on_this_machine(base_dir, monkeypatch, capsys):
    monkeypatch.setattr(hardware, "available_memory", lambda: 16 * GIB)
    monkeypatch.setattr(planner, "measured_rate", lambda *_: 1e11)
    base_train.main(["--depth", "100", "--plan", "--device", "cpu"])
    assert "does NOT fit" in capsys.readouterr().out


# ---- --plan, --hours, --budget ----


def test_plan_of_another_machine_reads_neither_data_nor_weights(base_dir, capsys):
    base_train.main(["--plan", "--for", "8xH100", "--depth", "24", "--fp8", "--target-param-data-ratio", "9.5"])
    table = {line[2:20].strip(): line for line in capsys.readouterr().out.splitlines()}
    assert "8 ranks x 16 rows x 2048 tokens x 4 passes" in table["batch"]
    assert "6,612 optimizer steps" in table["training"]
    assert "2h00m" in table["time"] and "$48" in table["cost"]
    assert "fits" in table["memory per rank"]
    assert list(base_dir.iterdir()) == []


def test_plan_of_this_machine_measures_its_speed(base_dir, capsys):
    small = ["--depth", "1", "--aspect-ratio", "32", "--head-dim", "32", "--max-seq-len", "64"]
    base_train.main([*small, "--plan", "--device", "cpu", "--num-iterations", "5"])
    out = capsys.readouterr().out
    assert "trial steps on this machine" in out and "no price is known" in out


@pytest.mark.parametrize("limit", [["--hours", "2"], ["--budget", "48"]])
def test_hours_or_budget_choose_the_depth(base_dir, capsys, limit):
    base_train.main(["--plan", "--for", "8xH100", *limit])
    out = capsys.readouterr().out
    depth = int(re.search(r"--depth (\d+) is the largest", out).group(1))
    target = planner.named_target("8xH100", fp8=False)
    hours = []
    for d in (depth, depth + 1):
        recipe = derive(RecipeFlags(depth=d), VOCAB)
        hours.append(target.seconds(recipe.model, recipe.flops) / 3600)
    assert hours[0] <= 2 < hours[1]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--for", "8xH100", "--budget", "0.001"], "too little even for --depth 1"),
        (["--for", "8xH100", "--budget", "5", "--hours", "1"], "give only one"),
        (["--device", "cpu", "--budget", "5"], "use --hours, or name a machine"),
        (["--for", "8xH10", "--budget", "5"], "cards: "),
    ],
)
def test_impossible_limits_are_refused(base_dir, monkeypatch, flags, message):
    monkeypatch.setattr(planner, "measured_rate", lambda *_: 1e11)
    with pytest.raises(SystemExit, match=message):
        base_train.main([*flags, "--plan"])
