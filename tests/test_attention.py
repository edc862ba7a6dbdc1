"""
Attention against the textbook formula, written out with one loop per head: windows, grouped heads, a cache.

    python -m pytest tests/test_attention.py
"""

import math

import pytest
import torch

from nanochat.attention import attend, attend_cached, band_mask


def naive_attention(q_BTHD, k_BSKD, v_BSKD, sees_BTS):
    """A masked softmax per query head, nothing clever; sees (B, T, S) is true where a query sees a key."""
    num_heads, group = q_BTHD.size(2), q_BTHD.size(2) // k_BSKD.size(2)
    outputs = []
    for head in range(num_heads):
        q, k, v = q_BTHD[:, :, head], k_BSKD[:, :, head // group], v_BSKD[:, :, head // group]
        scores_BTS = (q @ k.mT / math.sqrt(q.size(-1))).masked_fill(~sees_BTS, -math.inf)
        outputs.append(scores_BTS.softmax(dim=-1) @ v)
    return torch.stack(outputs, dim=2)


def naive_window(num_tokens, window):
    """(1, T, T): query t sees t - window … t."""
    rows = [[max(t - window, 0) <= s <= t for s in range(num_tokens)] for t in range(num_tokens)]
    return torch.tensor(rows)[None]


def random_heads(num_tokens, num_heads, num_kv_heads, head_dim=8, rows=2):
    torch.manual_seed(0)
    shapes = [(rows, num_tokens, heads, head_dim) for heads in (num_heads, num_kv_heads, num_kv_heads)]
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("num_heads, num_kv_heads", [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize(
    "num_tokens, window", [(1, 4), (7, 0), (33, 1), (37, 5), (64, 16), (61, 60), (61, 61), (62, 60), (5, 99)]
)
def test_attend_equals_a_masked_softmax_forward_and_backward(num_tokens, window, num_heads, num_kv_heads):
    qkv = random_heads(num_tokens, num_heads, num_kv_heads)
    weight = torch.randn(2, num_tokens, num_heads, 8)
    fast = attend(*qkv, window)
    fast_grads = torch.autograd.grad((fast * weight).sum(), qkv)
    slow = naive_attention(*qkv, naive_window(num_tokens, window))
    slow_grads = torch.autograd.grad((slow * weight).sum(), qkv)
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)
    for fast_grad, slow_grad in zip(fast_grads, slow_grads, strict=True):
        torch.testing.assert_close(fast_grad, slow_grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [0, 1, 3, 100])
def test_the_future_and_what_lies_before_the_window_have_no_influence(window):
    q, k, v = (x.detach() for x in random_heads(9, 2, 1))
    before = attend(q, k, v, window)
    k[:, 5], v[:, 5] = 50.0, 50.0
    changed = (attend(q, k, v, window) != before).flatten(2).any(-1).any(0)
    assert changed.tolist() == [5 <= t <= 5 + window for t in range(9)]


def test_band_mask_takes_any_positions_and_any_range_of_keys():
    mask = band_mask(torch.tensor([[4, 5], [0, 9]]), 2, 7, window=2)  # keys 2 3 4 5 6
    assert mask.int().tolist() == [[[1, 1, 1, 0, 0], [0, 1, 1, 1, 0]], [[0, 0, 0, 0, 0], [0, 0, 0, 0, 0]]]
    assert torch.equal(band_mask(torch.arange(11), 0, 11, 4)[None], naive_window(11, 4))


@pytest.mark.parametrize("num_heads, num_kv_heads", [(2, 2), (4, 1)])
def test_attend_cached_gives_the_last_rows_of_the_whole(num_heads, num_kv_heads):
    q, k, v = random_heads(23, num_heads, num_kv_heads)
    for new_tokens in (1, 6):
        positions_BT = torch.arange(23 - new_tokens, 23).expand(2, -1)
        mask_B1TS = band_mask(positions_BT, 0, 23, window=7).unsqueeze(1)
        cached = attend_cached(q[:, -new_tokens:], k, v, mask_B1TS)
        torch.testing.assert_close(cached, attend(q, k, v, 7)[:, -new_tokens:], rtol=1e-5, atol=1e-5)
