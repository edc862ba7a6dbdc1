"""
Bits per byte against a computation target by target.

    python -m pytest tests/test_bpb.py
"""

import math

import pytest
import torch

from nanochat.distributed import Dist
from nanochat.eval.bpb import evaluate_bpb
from nanochat.gpt import GPT, GPTConfig

CPU = Dist(torch.device("cpu"))
V, B, T = 40, 3, 16
TOKEN_BYTES = torch.tensor([1 + i % 5 for i in range(V - 9)] + [0] * 9, dtype=torch.int32)  # nine special tokens


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(T, V, 2, 2, 1, 32))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def batches(num_batches, unsupervised=0.0):
    generator = torch.Generator().manual_seed(1)
    for _ in range(num_batches):
        ids_BT = torch.randint(V, (B, T + 1), generator=generator)
        y_BT = ids_BT[:, 1:].masked_fill(torch.rand(B, T, generator=generator) < unsupervised, -1)
        yield ids_BT[:, :-1], y_BT


@torch.no_grad()
def naive_bpb(model, batches):
    nats = num_bytes = 0.0
    for x_BT, y_BT in batches:
        log_probs = model(x_BT).double().log_softmax(-1)
        for b in range(B):
            for t in range(T):
                target = int(y_BT[b, t])
                if target >= 0 and TOKEN_BYTES[target] > 0:
                    nats -= float(log_probs[b, t, target])
                    num_bytes += int(TOKEN_BYTES[target])
    return nats / math.log(2) / num_bytes


@pytest.mark.parametrize("num_batches, unsupervised", [(1, 0.0), (4, 0.0), (4, 0.6)])
def test_equals_the_naive_computation(model, num_batches, unsupervised):
    expected = naive_bpb(model, batches(num_batches, unsupervised))
    assert evaluate_bpb(model, batches(num_batches, unsupervised), TOKEN_BYTES, CPU) == pytest.approx(expected)


def test_special_targets_and_those_left_out_count_on_neither_side(model):
    (x_BT, y_BT), *_ = batches(1)
    y_BT[:, 5:] = -1
    some = evaluate_bpb(model, [(x_BT, y_BT)], TOKEN_BYTES, CPU)
    y_BT[:, 5:] = V - 1  # a special token
    assert evaluate_bpb(model, [(x_BT, y_BT)], TOKEN_BYTES, CPU) == pytest.approx(some)


def test_a_uniform_model_needs_log2_v_bits_per_token():
    model = GPT.create(GPTConfig(T, V, 1, 1, 1, 32))
    model.lm_head.weight.data.zero_()
    token_bytes = torch.full((V,), 4, dtype=torch.int32)
    assert evaluate_bpb(model, batches(2), token_bytes, CPU) == pytest.approx(math.log2(V) / 4)


def test_without_any_text_there_is_no_number(model):
    assert math.isnan(evaluate_bpb(model, [], TOKEN_BYTES, CPU))
    (x_BT, y_BT), *_ = batches(1)
    assert math.isnan(evaluate_bpb(model, [(x_BT, torch.full_like(y_BT, -1))], TOKEN_BYTES, CPU))


class TwoRanks(Dist):
    """Rank 0 of two that hold the same."""

    def sum(self, tensor):
        return tensor * 2


def test_ranks_add_nats_and_bytes(model):
    expected = evaluate_bpb(model, batches(2), TOKEN_BYTES, CPU)
    assert evaluate_bpb(model, batches(2), TOKEN_BYTES, TwoRanks(CPU.device)) == pytest.approx(expected)
