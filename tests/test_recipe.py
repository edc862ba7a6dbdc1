"""
The recipe: golden values for 32 settings, explicit steps and FLOPs, accumulation and its error, schedules.

    python -m pytest tests/test_recipe.py
"""

import json
import re
from dataclasses import astuple, replace
from functools import partial

import pytest
import torch
from conftest import golden

from nanochat import recipe
from nanochat.common import UserError
from nanochat.costs import flops_per_token, param_counts
from nanochat.gpt import GPT, GPTConfig
from nanochat.muon import build_optimizer
from nanochat.recipe import Hyperparameters, RecipeFlags, param_groups

CASES = json.loads(golden("recipe/recipe.json").read_text())


def exactly(value):
    return pytest.approx(value, rel=1e-9, abs=0)


@pytest.mark.parametrize("case", CASES["derived"], ids=lambda c: f"d{c['depth']}-{c['requested_total_batch_size']}")
def test_derived_recipe_matches_golden(case):
    batch = case["requested_total_batch_size"]
    if case["total_batch_size"] > recipe.MAX_BATCH:  # ours is capped: the golden recipe follows from its batch
        batch = case["total_batch_size"]
    flags = RecipeFlags(
        depth=case["depth"],
        head_dim=case["head_dim"],
        max_seq_len=case["max_seq_len"],
        window_pattern=case["window_pattern"],
        target_param_data_ratio=case["target_param_data_ratio"],
        total_batch_size=batch,
    )
    ours = recipe.derive(flags, case["vocab_size"])
    assert (ours.model.n_embd, ours.model.n_head) == (case["model_dim"], case["n_head"])
    assert param_counts(ours.model) == case["param_counts"]
    assert recipe.scaling_params(ours.model) == case["scaling_params"]
    assert flops_per_token(ours.model) == case["flops_per_token"]
    assert ours.horizon == case["target_tokens"]
    assert ours.total_batch_size == case["total_batch_size"]
    assert ours.num_iterations == case["num_iterations"]
    assert ours.hyperparameters.batch_lr_scale == exactly(case["lr_scale"])
    assert ours.weight_decay == exactly(case["weight_decay"])
    assert ours.flops == exactly(case["flops_per_token"] * case["num_iterations"] * case["total_batch_size"])


@pytest.mark.parametrize("case", CASES["derived"][::4], ids=lambda c: f"d{c['depth']}")
def test_width_factor_of_the_learning_rates_matches_golden(case):
    config = GPTConfig(16, 64, 1, 1, 1, case["model_dim"])
    groups = param_groups(config, Hyperparameters(total_batch_size=case["total_batch_size"]))
    learning_rates = {group.name: group.lr for group in groups}
    assert learning_rates["wte"] == exactly(0.3 * case["adamw_dmodel_lr_scale"] * case["lr_scale"])


@pytest.mark.parametrize("case", CASES["schedules"], ids=lambda c: f"{c['num_iterations']} steps")
def test_schedules_match_golden(case):
    steps = case["num_iterations"]
    flags = RecipeFlags(
        recipe="nanochat",
        warmup_steps=case["warmup_steps"],
        warmdown_ratio=case["warmdown_ratio"],
        final_lr_frac=case["final_lr_frac"],
    )
    for point in case["points"]:
        step = point["step"]
        assert recipe.lr_multiplier(flags, steps, step) == exactly(point["lr_multiplier"]), step
        assert recipe.muon_momentum(flags, steps, step) == exactly(point["muon_momentum"]), step
        assert recipe.decay_multiplier(steps, step) == exactly(point["weight_decay_fraction"]), step


@pytest.mark.parametrize("steps", [1, 2, 5, 39, 40, 41, 100, 399, 401, 1500])
@pytest.mark.parametrize("warmup, warmdown", [(40, 0.65), (0, 1.0), (0, 0.0), (10, 0.2)])
def test_schedules_stay_in_range_for_any_length(steps, warmup, warmdown):
    flags = RecipeFlags(warmup_steps=warmup, warmdown_ratio=warmdown)
    for step in range(steps):
        assert 0 < recipe.lr_multiplier(flags, steps, step) <= 1
        assert 0.85 <= recipe.muon_momentum(flags, steps, step) <= 0.97
        assert 0 <= recipe.decay_multiplier(steps, step) <= 1


def test_schedule_values_reach_the_optimizer():
    model = GPT.create(GPTConfig(16, 64, 2, 2, 2, 32))
    optimizer = build_optimizer(model, param_groups(model.config, weight_decay=0.5))
    flags = RecipeFlags(warmup_steps=10, warmdown_ratio=0.5, final_lr_frac=0.0)
    optimizer.set_schedule(recipe.pretrain_schedule(flags, 100, 75, 0.75))
    for group in optimizer.param_groups:
        assert group["lr"] == exactly(group["initial_lr"] * 0.5)
        if group["kind"] == "muon":
            assert group["momentum"] == exactly(0.85 + 0.12 * 75 / 400)
            assert group["decay"] == exactly(0.5 * recipe.decay_multiplier(100, 75))


def test_residual_scalars_rest_in_the_first_step_of_pretraining():
    model = GPT.create(GPTConfig(16, 64, 2, 2, 2, 32))
    optimizer = build_optimizer(model, param_groups(model.config))
    schedule = partial(recipe.pretrain_schedule, RecipeFlags(warmup_steps=5), 100)
    optimizer.set_schedule(schedule(0, 0.0))
    resting = {group["name"] for group in optimizer.param_groups if group["lr"] == 0}
    assert resting == {"resid", "x0", "smear_backout"}  # their first gradients are rounding errors
    optimizer.set_schedule(schedule(1, 0.01))
    assert all(group["lr"] == exactly(group["initial_lr"] * 0.4) for group in optimizer.param_groups)


def test_finetuning_schedules_fall_to_zero_from_half_or_from_the_start():
    assert astuple(recipe.finetune_schedule(150, 0.75)) == exactly((0.5, 0.90, 1.0, False))
    assert recipe.finetune_schedule(0, 0.5).lr_multiplier == 1.0
    assert astuple(recipe.rl_schedule(300, 0.75)) == exactly((0.25, 0.95, 1.0, False))


@pytest.mark.parametrize("batch, expected", [(2**13, 0.2 / 8), (2**17, 0.1), (2**19, 0.2), (2**21, 0.2)])
def test_rate_of_smear_and_backout_is_lower_for_small_batches_only(batch, expected):
    groups = param_groups(GPTConfig(16, 64, 2, 2, 2, 32), Hyperparameters(total_batch_size=batch))
    assert {group.name: group.lr for group in groups}["smear_backout"] == exactly(expected)


def test_finetuning_takes_its_share_of_each_learning_rate():
    config = GPTConfig(16, 64, 2, 2, 2, 32)
    whole, share = param_groups(config), param_groups(config, lr_frac=0.05)
    assert [group.lr for group in share] == exactly([0.05 * group.lr for group in whole])


# ---- hyperparameters of checkpoints ----


@pytest.mark.parametrize(
    "meta, expected",
    [
        ({}, Hyperparameters()),
        (  # as other versions of nanochat save them
            {
                "user_config": {"device_batch_size": 8, "matrix_lr": 0.04, "total_batch_size": -1},
                "total_batch_size": 4096,
            },
            Hyperparameters(8, 4096, matrix_lr=0.04),
        ),
        (
            {"flags": {"device_batch_size": 8, "total_batch_size": -1}, "recipe": {"total_batch_size": 1024}},
            Hyperparameters(8, 1024),
        ),
        (  # of a fine-tuning run, whose flags leave the batch sizes to its source
            {"flags": {"device_batch_size": -1, "total_batch_size": -1}, "settings": {"device_batch_size": 2}},
            Hyperparameters(2),
        ),
    ],
)
def test_hyperparameters_are_found_in_all_kinds_of_checkpoints(meta, expected):
    assert recipe.load_hyperparameters(meta) == expected


# ---- the table for users ----


@pytest.mark.parametrize("options", [{}, {"num_iterations": 100}, {"target_flops": 1e17}, {"total_batch_size": 4096}])
def test_explanation_shows_the_derived_values(options):
    flags = RecipeFlags(depth=4, **options)
    plan = recipe.derive(flags, 32768)
    rows = {name: (value, how) for name, value, how in recipe.explain(flags, plan)}
    assert rows["batch B"][0] == f"{plan.total_batch_size:,} tokens"
    assert rows["optimizer steps"][0] == f"{plan.num_iterations:,}"
    assert float(rows["lr of wte"][0]) == pytest.approx(plan.groups[1].lr, rel=1e-3)
    given = {"num_iterations": "--num-iterations", "target_flops": "--target-flops"}
    for name, text in given.items():
        assert (text in rows["optimizer steps"][1]) == (name in options)
    assert (rows["batch B"][1] == "--total-batch-size") == ("total_batch_size" in options)


# ---- explicit length ----


@pytest.mark.parametrize("depth", [2, 4, 12, 24])
@pytest.mark.parametrize("num_iterations", [1, 10, 300, 5000, 100_000])
def test_explicit_steps_set_the_horizon_for_batch_and_weight_decay(depth, num_iterations):
    ours = recipe.derive(RecipeFlags(recipe="nanochat", depth=depth, num_iterations=num_iterations), 32768)
    reference = 12 * recipe.scaling_params(recipe.model_config(RecipeFlags(depth=12), 32768))
    assert ours.num_iterations == num_iterations
    assert ours.horizon == num_iterations * ours.total_batch_size
    assert ours.total_batch_size == recipe.batch_for_horizon(ours.horizon, reference)  # the choice agrees with itself
    assert ours.weight_decay == exactly(0.28 * (ours.total_batch_size / 2**19) ** 0.5 * reference / ours.horizon)


@pytest.mark.parametrize("share, factor", [(2, 1), (1, 1), (0.5, 2**0.32), (0.05, 20**0.32), (0.001, 4)])
def test_learning_rates_are_higher_where_the_ratio_would_give_more_tokens(share, factor):
    num_tokens = 12 * recipe.scaling_params(recipe.model_config(RecipeFlags(depth=4), 8192))
    steps = round(share * num_tokens / 8192)
    flags = RecipeFlags(depth=4, num_iterations=steps, total_batch_size=8192)
    ours, before = (recipe.derive(flags_, 8192) for flags_ in (flags, replace(flags, recipe="nanochat")))
    for group, old in zip(ours.groups, before.groups, strict=True):
        expected = 1 if group.name in ("resid", "x0", "smear_backout") else factor
        assert group.lr / old.lr == pytest.approx(expected, rel=1e-3), group.name
    assert ours.weight_decay * factor == pytest.approx(before.weight_decay, rel=1e-3)
    assert ours.hyperparameters.matrix_lr == pytest.approx(0.02 * factor, rel=1e-3)  # fine-tuning starts from these


def test_warm_up_takes_at_most_a_20th_of_the_run():
    assert [recipe.warmup_steps(RecipeFlags(), steps) for steps in (1, 20, 227, 800, 5000)] == [1, 1, 12, 40, 40]
    assert recipe.warmup_steps(RecipeFlags(recipe="nanochat"), 227) == 40


def test_explicit_steps_equal_to_the_derived_ones_give_the_same_batch():
    by_ratio = recipe.derive(RecipeFlags(depth=12), 32768)
    by_steps = recipe.derive(RecipeFlags(depth=12, num_iterations=by_ratio.num_iterations), 32768)
    assert by_steps.total_batch_size == by_ratio.total_batch_size
    assert by_steps.weight_decay == pytest.approx(by_ratio.weight_decay, rel=1e-3)


@pytest.mark.parametrize("target_flops", [1e16, 1e18, 3e19])
def test_explicit_flops_set_the_horizon(target_flops):
    ours = recipe.derive(RecipeFlags(depth=8, target_flops=target_flops), 32768)
    reference = 12 * recipe.scaling_params(recipe.model_config(RecipeFlags(depth=12), 32768))
    one_step = flops_per_token(ours.model) * ours.total_batch_size
    assert abs(ours.flops - target_flops) <= one_step / 2
    assert ours.total_batch_size == recipe.batch_for_horizon(ours.horizon, reference)
    assert abs(ours.horizon - ours.num_iterations * ours.total_batch_size) <= ours.total_batch_size / 2 + 1


@pytest.mark.parametrize("options", [{}, {"num_iterations": 100_000}, {"target_flops": 1e22}])
def test_derived_batch_is_capped(options):
    ours = recipe.derive(RecipeFlags(depth=34, **options), 32768)
    assert ours.total_batch_size == recipe.MAX_BATCH == 2**20
    assert ours.hyperparameters.batch_lr_scale == exactly(2**0.5)  # rates and decay follow the capped batch
    explicit = recipe.derive(RecipeFlags(depth=34, total_batch_size=2**21), 32768)
    assert explicit.total_batch_size == 2**21


def test_explicit_batch_is_kept():
    ours = recipe.derive(RecipeFlags(depth=4, total_batch_size=4096, num_iterations=50), 32768)
    assert (ours.total_batch_size, ours.horizon) == (4096, 50 * 4096)


@pytest.mark.parametrize(
    "options",
    [
        {"head_dim": 7},
        {"window_pattern": "XL"},
        {"target_flops": 1.0},  # less than one token
        {"total_batch_size": 2**50},
    ],
)
def test_impossible_flags_raise_user_error(options):
    with pytest.raises(UserError):
        recipe.derive(RecipeFlags(**{"depth": 4} | options), 32768)


# ---- accumulation ----


def test_accumulation_is_whole_or_the_error_names_working_batch_sizes():
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
