"""
The model of memory and time, against measured peaks.

    python -m pytest tests/test_costs.py
"""

import pytest
import torch

from nanochat.costs import (
    GIB,
    TrainingSetup,
    cache_bytes,
    decode_bytes,
    expected_mfu,
    largest_batch,
    matmul_weights,
    training_memory,
)
from nanochat.recipe import RecipeFlags, derive, model_config

VOCAB = 32768


def config_of(depth, **flags):
    return model_config(RecipeFlags(depth=depth, **flags), VOCAB)


# torch.cuda.max_memory_allocated over two steps of two micro-batches of 2,048 tokens a row, one rank, torch 2.11.
@pytest.mark.parametrize(
    "depth, rows, compiled, fp8, attention, measured",
    [
        (12, 16, True, False, "flash", 16.279),
        (12, 32, True, False, "flash", 28.008),
        (20, 32, True, False, "flash", 76.22),
        (24, 16, True, False, "flash", 65.138),
        (24, 16, True, True, "flash", 53.2),
        (12, 16, False, False, "flash", 19.833),
        (12, 32, False, False, "flash", 35.357),
        (20, 16, False, False, "flash", 48.217),
        (12, 16, False, False, "banded", 20.283),
    ],
)
def test_peak_on_a_gpu_is_predicted_within_2_percent(depth, rows, compiled, fp8, attention, measured):
    setup = TrainingSetup(rows=rows, compiled=compiled, fp8=fp8, attention=attention)
    assert training_memory(config_of(depth), setup).peak / GIB == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("dtype, measured", [(torch.float16, 3.43), (torch.float32, 3.964)])
def test_peak_of_a_narrow_model_is_predicted_within_5_percent(dtype, measured):
    setup = TrainingSetup(rows=16, compiled=False, attention="banded", dtype=dtype)
    config = config_of(4, head_dim=64, max_seq_len=1024)
    assert training_memory(config, setup).peak / GIB == pytest.approx(measured, rel=0.05)


def test_optimizer_state_is_shared_by_the_ranks():
    one, eight = (training_memory(config_of(12), TrainingSetup(rows=4, world_size=ranks)) for ranks in (1, 8))
    assert eight.parts["optimizer state"] == one.parts["optimizer state"] / 8
    assert eight.parts["weights"] == one.parts["weights"]
    assert eight.parts["communication"] > one.parts["communication"] == 0


def test_with_one_short_row_the_update_is_the_peak():
    memory = training_memory(config_of(20, max_seq_len=128), TrainingSetup(rows=1))
    assert memory.peak_phase == "optimizer update"
    assert memory.peak == memory.of_phase("optimizer update") > memory.of_phase("backward pass")


def test_largest_batch_is_the_largest_power_of_two_that_fits():
    config, setup = config_of(24), TrainingSetup(rows=1, world_size=8)
    rows = largest_batch(config, setup, 2**20, 76 * GIB)
    assert rows == 16
    assert training_memory(config, TrainingSetup(rows=16, world_size=8)).peak <= 76 * GIB
    assert training_memory(config, TrainingSetup(rows=32, world_size=8)).peak > 76 * GIB


def test_largest_batch_divides_the_rows_of_a_step():
    config, setup = config_of(4, max_seq_len=512), TrainingSetup(rows=1)
    assert largest_batch(config, setup, 12 * 512, 1000 * GIB) == 4  # powers of two, where the step has an even number
    assert largest_batch(config, setup, 15 * 512, 1000 * GIB) == 15
    assert largest_batch(config, setup, 15 * 512, 0.0) == 0


def test_cache_of_full_windows_is_that_of_its_tokens():
    config = config_of(4, window_pattern="L")
    one_slot = config.n_layer * 2 * config.kv_width * 2 * 100
    assert cache_bytes(config, slots=3, length=100, dtype=torch.bfloat16) == 3 * one_slot
    short_windows = config_of(4, window_pattern="SSSL")
    assert cache_bytes(short_windows, 1, 2048, torch.bfloat16) < cache_bytes(config, 1, 2048, torch.bfloat16) / 2


# Public runs of nanochat on 8 H100s: tokens/s of October 2025 (depth 20), hours to GPT-2's CORE (depth 24, FP8).
@pytest.mark.parametrize("ratio, hours", [(9.5, 2.02), (8.0, 1.65)])
def test_time_of_public_runs_is_predicted_within_15_percent(ratio, hours):
    recipe = derive(RecipeFlags(depth=24, target_param_data_ratio=ratio), VOCAB)
    rate = 8 * 989e12 * expected_mfu(recipe.model, fp8=True)
    assert recipe.flops / rate / 3600 == pytest.approx(hours, rel=0.15)


def test_decode_step_reads_the_weights_once_and_the_cache_of_each_row():
    config, context = config_of(4), 100
    layers, keys_and_values = 4, 2
    row = layers * (context + 1) * keys_and_values * config.kv_width * 4
    expected = 2 * matmul_weights(config) + 3 * row
    assert decode_bytes(config, 3, context, weight_bytes=2, cache_dtype=torch.float32) == expected
