"""
The recipe: golden values for 32 settings, explicit steps and FLOPs, accumulation and its error, schedules.

    python -m pytest tests/test_recipe.py
"""

import json
import re

import pytest
import torch
from conftest import golden

from nanochat import recipe
from nanochat.common import UserError
from nanochat.gpt import GPT, GPTConfig, flops_per_token, param_counts
from nanochat.muon import LearningRates, build_optimizer

CASES = json.loads(golden("recipe/recipe.json").read_text())


def exactly(value):
    return pytest.approx(value, rel=1e-9, abs=0)


@pytest.mark.parametrize("case", CASES["derived"], ids=lambda c: f"d{c['depth']}-{c['requested_total_batch_size']}")
def test_golden_recipes(case):
    ours = recipe.derive(
        case["depth"],
        case["vocab_size"],
        head_dim=case["head_dim"],
        sequence_len=case["max_seq_len"],
        window_pattern=case["window_pattern"],
        data_ratio=case["target_param_data_ratio"],
        total_batch_size=case["requested_total_batch_size"],
    )
    assert (ours.model.n_embd, ours.model.n_head) == (case["model_dim"], case["n_head"])
    assert param_counts(ours.model) == case["param_counts"]
    assert recipe.scaling_params(ours.model) == case["scaling_params"]
    assert flops_per_token(ours.model) == case["flops_per_token"]
    assert ours.horizon == case["target_tokens"]
    assert ours.total_batch_size == case["total_batch_size"]
    assert ours.num_iterations == case["num_iterations"]
    assert ours.batch_factor == exactly(case["lr_scale"])
    assert ours.weight_decay == exactly(case["weight_decay"])
    assert ours.flops == exactly(case["flops_per_token"] * case["num_iterations"] * case["total_batch_size"])


@pytest.mark.parametrize("case", CASES["derived"][::4], ids=lambda c: f"d{c['depth']}")
def test_golden_width_factor_of_the_learning_rates(case):
    model = GPT(GPTConfig(16, 64, 1, 1, 1, case["model_dim"]), device="meta")
    optimizer = build_optimizer(model, LearningRates(), batch_factor=case["lr_scale"])
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates["wte"] == exactly(0.3 * case["adamw_dmodel_lr_scale"] * case["lr_scale"])


@pytest.mark.parametrize("case", CASES["schedules"], ids=lambda c: f"{c['num_iterations']} steps")
def test_golden_schedules(case):
    steps, warmdown = case["num_iterations"], case["warmdown_ratio"]
    for point in case["points"]:
        step = point["step"]
        multiplier = recipe.lr_multiplier(step, steps, case["warmup_steps"], warmdown, case["final_lr_frac"])
        assert multiplier == exactly(point["lr_multiplier"]), step
        assert recipe.muon_momentum(step, steps, warmdown) == exactly(point["muon_momentum"]), step
        assert recipe.decay_multiplier(step, steps) == exactly(point["weight_decay_fraction"]), step


@pytest.mark.parametrize("steps", [1, 2, 5, 39, 40, 41, 100, 399, 401, 1500])
@pytest.mark.parametrize("warmup, warmdown", [(40, 0.65), (0, 1.0), (0, 0.0), (10, 0.2)])
def test_schedules_are_sane_for_any_length(steps, warmup, warmdown):
    for step in range(steps):
        assert 0 < recipe.lr_multiplier(step, steps, warmup, warmdown, 0.05) <= 1
        assert 0.85 <= recipe.muon_momentum(step, steps, warmdown) <= 0.97
        assert 0 <= recipe.decay_multiplier(step, steps) <= 1


def test_the_schedule_reaches_the_optimizer():
    optimizer = build_optimizer(GPT.create(GPTConfig(16, 64, 2, 2, 2, 32)), LearningRates(), weight_decay=0.5)
    recipe.pretrain_schedule(optimizer, 75, 100, warmup_steps=10, warmdown_ratio=0.5, final_frac=0.0)
    for group in optimizer.param_groups:
        assert group["lr"] == exactly(group["initial_lr"] * 0.5)
        if group["kind"] == "muon":
            assert group["momentum"] == exactly(0.85 + 0.12 * 75 / 400)
            assert group["decay"] == exactly(0.5 * recipe.decay_multiplier(75, 100))
    recipe.pretrain_schedule(optimizer, 0, 100, warmup_steps=10, warmdown_ratio=0.5, final_frac=0.0)
    resting = {g["name"] for g in optimizer.param_groups if not g["lr"]}
    assert resting == {"resid", "x0", "smear_backout"}  # their first gradients are rounding errors
    recipe.pretrain_schedule(optimizer, 1, 100, warmup_steps=10, warmdown_ratio=0.5, final_frac=0.0)
    assert all(g["lr"] == exactly(g["initial_lr"] * 0.2) for g in optimizer.param_groups)
    recipe.finetune_schedule(optimizer, 150, 0.75)
    assert {g["lr"] / g["initial_lr"] for g in optimizer.param_groups} == {0.5}
    assert all(g["momentum"] == exactly(0.90) for g in optimizer.param_groups if g["kind"] == "muon")
    recipe.rl_schedule(optimizer, 300, 0.75)
    assert {g["lr"] / g["initial_lr"] for g in optimizer.param_groups} == {0.25}
    assert all(g["momentum"] == exactly(0.95) for g in optimizer.param_groups if g["kind"] == "muon")


# ---- explicit length ----


@pytest.mark.parametrize("depth", [2, 4, 12, 24])
@pytest.mark.parametrize("num_iterations", [1, 10, 300, 5000, 100_000])
def test_explicit_steps_set_the_horizon_that_batch_and_decay_follow(depth, num_iterations):
    ours = recipe.derive(depth, 32768, num_iterations=num_iterations)
    reference = 12 * recipe.scaling_params(recipe.model_config(12, 32768))
    assert ours.num_iterations == num_iterations
    assert ours.horizon == ours.num_tokens == num_iterations * ours.total_batch_size
    assert ours.total_batch_size == recipe.batch_for_horizon(ours.horizon, reference)  # the choice agrees with itself
    assert ours.weight_decay == exactly(0.28 * (ours.total_batch_size / 2**19) ** 0.5 * reference / ours.horizon)


def test_the_steps_of_the_ratio_given_explicitly_give_the_same_batch():
    by_ratio = recipe.derive(12, 32768)
    by_steps = recipe.derive(12, 32768, num_iterations=by_ratio.num_iterations)
    assert by_steps.total_batch_size == by_ratio.total_batch_size
    assert by_steps.weight_decay == pytest.approx(by_ratio.weight_decay, rel=1e-3)


@pytest.mark.parametrize("target_flops", [1e16, 1e18, 3e19])
def test_explicit_flops_set_the_horizon(target_flops):
    ours = recipe.derive(8, 32768, target_flops=target_flops)
    reference = 12 * recipe.scaling_params(recipe.model_config(12, 32768))
    one_step = flops_per_token(ours.model) * ours.total_batch_size
    assert abs(ours.flops - target_flops) <= one_step / 2
    assert ours.total_batch_size == recipe.batch_for_horizon(ours.horizon, reference)
    assert abs(ours.horizon - ours.num_tokens) <= ours.total_batch_size / 2 + 1


def test_a_given_batch_is_kept():
    ours = recipe.derive(4, 32768, total_batch_size=4096, num_iterations=50)
    assert (ours.total_batch_size, ours.horizon) == (4096, 50 * 4096)


@pytest.mark.parametrize(
    "options",
    [
        {"depth": 0},
        {"head_dim": 7},
        {"head_dim": 8},
        {"aspect_ratio": 0},
        {"sequence_len": 0},
        {"window_pattern": "XL"},
        {"target_flops": 1.0},  # less than one token
        {"data_ratio": -1.0},
        {"total_batch_size": 2**50},
    ],
)
def test_impossible_settings_are_user_errors(options):
    with pytest.raises(UserError):
        recipe.derive(**{"depth": 4, "vocab_size": 32768} | options)


# ---- accumulation ----


def test_accumulation_is_whole_or_an_error_that_names_values_that_work():
    generator = torch.Generator().manual_seed(0)

    def draw(choices):
        return choices[int(torch.randint(len(choices), (1,), generator=generator))]

    refused = 0
    for _ in range(2000):
        total = draw([2**k for k in range(8, 21)] + [1000, 3 * 2**14, 524_289])
        rows, length, ranks = draw([1, 2, 3, 5, 8, 12, 32, 64]), draw([32, 100, 512, 2048]), draw([1, 2, 3, 6, 8])
        try:
            steps = recipe.accumulation_steps(total, rows, length, ranks)
        except UserError as error:
            refused += 1
            message = str(error).partition("use ")[2]
            numbers = re.findall(r"total-batch-size (\d+)(?: or (\d+))?", message)[0]
            totals = [int(number) for number in numbers if number]
            assert totals and min(abs(t - total) for t in totals) < rows * length * ranks
            for other in totals:
                assert recipe.accumulation_steps(other, rows, length, ranks) >= 1
            for fitting in re.findall(r"device-batch-size (\d+)", message):
                assert recipe.accumulation_steps(total, int(fitting), length, ranks) >= 1
                assert int(fitting) <= rows  # what fits in memory
        else:
            assert steps >= 1 and steps * rows * length * ranks == total
    assert 200 < refused < 1800


@pytest.mark.parametrize("rows", [0, -1])
def test_a_device_batch_of_nothing_is_refused(rows):
    with pytest.raises(UserError, match="device-batch-size"):
        recipe.accumulation_steps(1024, rows, 32, 1)
