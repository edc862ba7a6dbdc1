"""
The model of memory and time, against measured peaks.

    python -m pytest tests/test_costs.py
"""

import pytest
import torch

from nanochat.costs import (
    GIB,
    TrainingSetup,
    bytes_communicated,
    cache_bytes,
    decode_bytes,
    expected_mfu,
    flops_per_token,
    generation_memory,
    largest_batch,
    matmul_weights,
    param_counts,
    recomputed_share,
    training_memory,
)
from nanochat.recipe import RecipeFlags, derive, model_config

VOCAB = 32768


def config_of(depth, **flags):
    return model_config(RecipeFlags(depth=depth, **flags), VOCAB)


# torch.cuda.max_memory_allocated over two steps of two micro-batches of 2,048 tokens a row, one rank, torch 2.11.
@pytest.mark.parametrize(
    "depth, rows, setup, measured",
    [
        (12, 16, {"compiled": False}, 16.504),
        (12, 32, {"compiled": False}, 28.843),
        (24, 16, {"compiled": False}, 67.219),
        (24, 8, {"compiled": False, "fp8": True}, 41.320),
        (12, 16, {"compiled": False, "attention": "banded"}, 16.922),
        (12, 32, {"compiled": False, "activation_checkpointing": True}, 8.564),
        (24, 16, {"compiled": False, "activation_checkpointing": True}, 25.902),
        (24, 64, {"compiled": False, "activation_checkpointing": True}, 41.028),
        (24, 16, {"compiled": False, "activation_checkpointing": True, "fp8": True}, 27.168),
    ],
)
def test_peak_on_a_gpu_is_predicted_within_2_percent(depth, rows, setup, measured):
    predicted = training_memory(config_of(depth), TrainingSetup(rows, accumulation=2, **setup)).peak
    assert predicted / GIB == pytest.approx(measured, rel=0.02)


# The same with one micro-batch in each of two steps.
@pytest.mark.parametrize(
    "depth, rows, fp8, measured", [(12, 32, False, 27.910), (24, 8, False, 38.368), (24, 8, True, 36.229)]
)
def test_peak_of_a_step_with_one_pass_is_predicted_within_2_percent(depth, rows, fp8, measured):
    setup = TrainingSetup(rows, compiled=False, fp8=fp8)
    assert training_memory(config_of(depth), setup).peak / GIB == pytest.approx(measured, rel=0.02)
    twice = training_memory(config_of(depth), TrainingSetup(rows, accumulation=2, compiled=False, fp8=fp8))
    assert twice.peak - training_memory(config_of(depth), setup).peak == twice.parts["gradients"]


def test_gains_of_norms_keep_another_tensor_in_eager_code():
    config = config_of(12, norm_gains=True)
    peak = training_memory(config, TrainingSetup(32, compiled=False)).peak
    assert peak / GIB == pytest.approx(29.036, rel=0.02)  # 27.911 without them
    assert peak - training_memory(config_of(12), TrainingSetup(32, compiled=False)).peak > 1.0 * GIB


# The same, compiled.
@pytest.mark.parametrize("rows, recomputes, measured", [(16, False, 6.870), (16, True, 4.002), (32, True, 5.920)])
def test_peak_of_a_compiled_model_is_predicted_within_2_percent(rows, recomputes, measured):
    setup = TrainingSetup(rows, accumulation=2, activation_checkpointing=recomputes)
    predicted = training_memory(config_of(4, aspect_ratio=192), setup).peak
    assert predicted / GIB == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("dtype, measured", [(torch.float16, 1.649), (torch.float32, 2.281)])
def test_peak_of_a_narrow_model_is_predicted_within_5_percent(dtype, measured):
    setup = TrainingSetup(16, accumulation=2, compiled=False, attention="banded", dtype=dtype)
    config = config_of(4, head_dim=64, max_seq_len=1024)
    assert training_memory(config, setup).peak / GIB == pytest.approx(measured, rel=0.05)


# The same for rank 0 of several that are sharded, on the null GPU with torch's fake process group.
@pytest.mark.parametrize(
    "depth, rows, world_size, recomputes, measured",
    [
        (12, 8, 8, False, 7.060),
        (12, 8, 8, True, 1.909),
        (24, 4, 8, True, 4.269),
        (16, 8, 4, True, 3.814),
        (12, 4, 2, False, 5.584),
    ],
)
def test_peak_of_a_sharded_model_is_predicted_within_2_percent(depth, rows, world_size, recomputes, measured):
    setup = TrainingSetup(rows, 2, world_size, compiled=False, activation_checkpointing=recomputes, sharded=True)
    assert training_memory(config_of(depth), setup).peak / GIB == pytest.approx(measured, rel=0.02)


def test_sharded_ranks_send_more_for_each_micro_batch_and_less_for_muon_the_more_ranks():
    config = config_of(16)
    matrices = 4 * param_counts(config)["transformer_matrices"]

    def sent(world_size, **setup):
        return bytes_communicated(config, TrainingSetup(1, world_size=world_size, **setup))

    for world_size in (2, 8):
        all_to_all = 2 * matrices * (world_size - 1) / world_size**2
        assert sent(world_size, sharded=True)["Muon"] == pytest.approx(all_to_all, rel=0.01)
    assert sum(sent(8, sharded=True, accumulation=4).values()) > 3 * sum(sent(8, sharded=True).values())
    assert sent(8, accumulation=4) == sent(8)  # gradients are accumulated before they are exchanged
    assert sum(sent(1, sharded=True).values()) == 0


def test_optimizer_state_is_shared_by_the_ranks():
    one, eight = (training_memory(config_of(12), TrainingSetup(rows=4, world_size=ranks)) for ranks in (1, 8))
    assert eight.parts["optimizer state"] == one.parts["optimizer state"] / 8
    assert eight.parts["weights"] == one.parts["weights"]
    assert eight.parts["communication"] > one.parts["communication"] == 0


def test_with_one_short_row_the_update_is_the_peak():
    memory = training_memory(config_of(20, max_seq_len=128), TrainingSetup(rows=1))
    assert memory.peak_phase == "optimizer update"
    assert memory.peak == memory.of_phase("optimizer update") > memory.of_phase("backward pass")


def test_activation_checkpointing_adds_a_forward_pass_of_the_layers():
    config = config_of(24)
    forward_and_lm_head = flops_per_token(config) / 3
    lm_head = 2 * config.padded_vocab_size * config.n_embd
    added = recomputed_share(config) * flops_per_token(config)
    assert added == pytest.approx(forward_and_lm_head - lm_head, rel=1e-6)
    assert 0.28 < recomputed_share(config) < 1 / 3


def test_largest_batch_is_the_largest_power_of_two_that_fits():
    config, setup = config_of(24), TrainingSetup(rows=1, world_size=8)
    rows = largest_batch(config, setup, 2**20, 76 * GIB)
    assert rows == 16
    assert training_memory(config, TrainingSetup(16, accumulation=4, world_size=8)).peak <= 76 * GIB
    assert training_memory(config, TrainingSetup(32, accumulation=2, world_size=8)).peak > 76 * GIB


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


def test_cache_is_float32_in_eager_steps_on_a_cpu_only():
    config = config_of(4)
    sizes = {
        (device, compiled): generation_memory(config, 2, 100, torch.bfloat16, device, compiled=compiled).parts
        for device in ("cpu", "cuda")
        for compiled in (False, True)
    }
    caches = {key: parts["KV cache"] for key, parts in sizes.items()}
    assert caches["cpu", False] == cache_bytes(config, 2, 100, torch.float32)
    for key in (("cpu", True), ("cuda", False), ("cuda", True)):
        assert caches[key] == cache_bytes(config, 2, 100, torch.bfloat16)


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
