"""
Bits per byte against a computation one target at a time.

    python -m pytest tests/test_bpb.py
"""

import math

import pytest
import torch
from factories import tiny_gpt

from nanochat.distributed import Dist
from nanochat.eval.bpb import evaluate_bpb

CPU = Dist(torch.device("cpu"))
V, B, T = 40, 3, 16
TOKEN_BYTES = torch.tensor([1 + i % 5 for i in range(V - 9)] + [0] * 9, dtype=torch.int32)  # nine special tokens


@pytest.fixture(scope="module")
def model():
    return tiny_gpt(sequence_len=T, vocab_size=V)


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
def test_evaluate_bpb_equals_naive_computation(model, num_batches, unsupervised):
    expected = naive_bpb(model, batches(num_batches, unsupervised))
    assert evaluate_bpb(model, batches(num_batches, unsupervised), TOKEN_BYTES, CPU) == pytest.approx(expected)


def test_evaluate_bpb_ignores_special_and_masked_targets(model):
    (x_BT, y_BT), *_ = batches(1)
    y_BT[:, 5:] = -1
    some = evaluate_bpb(model, [(x_BT, y_BT)], TOKEN_BYTES, CPU)
    y_BT[:, 5:] = V - 1  # a special token
    assert evaluate_bpb(model, [(x_BT, y_BT)], TOKEN_BYTES, CPU) == pytest.approx(some)


def test_evaluate_bpb_of_uniform_model_is_log2_v_per_token():
    model = tiny_gpt(sequence_len=T, vocab_size=V, initial=True)
    model.lm_head.weight.data.zero_()
    token_bytes = torch.full((V,), 4, dtype=torch.int32)
    assert evaluate_bpb(model, batches(2), token_bytes, CPU) == pytest.approx(math.log2(V) / 4)


def test_evaluate_bpb_without_bytes_is_nan(model):
    assert math.isnan(evaluate_bpb(model, [], TOKEN_BYTES, CPU))
    (x_BT, y_BT), *_ = batches(1)
    assert math.isnan(evaluate_bpb(model, [(x_BT, torch.full_like(y_BT, -1))], TOKEN_BYTES, CPU))


class TwoRanks(Dist):
    """Rank 0 of two ranks with the same data."""

    def sum(self, tensor):
        return tensor * 2


def test_evaluate_bpb_on_ranks_adds_nats_and_bytes(model):
    expected = evaluate_bpb(model, batches(2), TOKEN_BYTES, CPU)
    assert evaluate_bpb(model, batches(2), TOKEN_BYTES, TwoRanks(CPU.device)) == pytest.approx(expected)
