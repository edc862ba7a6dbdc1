"""
The attention kernel "blocks" for CPUs: plain matrix products over blocks of the sequence, forward and backward.

A block of 128 queries is multiplied with the blocks of keys that its window reaches, for so many heads at a time that
their scores fit into the CPU's cache. Two things make it fast: oneDNN's matrix products, and no pass over the scores to
find their maximum. Softmax usually subtracts the maximum first, so that exp cannot overflow; here scores must stay
below 80 instead. With normed queries and keys they are at most gain² * sqrt(D), which is 16 for D = 128. float16 is
refused, because exp(16) is beyond its range.

Shapes: B sequences, T tokens, H heads, K key/value heads, D head size; m blocks of t tokens, N = B * H heads of all
sequences, n heads at a time, s keys that a block of queries reaches.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from nanochat.kernels import Kernel, band_mask

BLOCK = 128  # tokens; the windows of the models are multiples of it
CACHED_SCORES = 2**21  # scores computed at a time: 4 MiB in bfloat16
SAVED_WEIGHTS = 2**24  # weights of a layer that are saved for its backward pass: 32 MiB in bfloat16


@functools.cache
def load_blocks() -> Kernel:
    """
    Registers the kernel as an operator of torch and returns it.

    torch.compile then keeps the loop over blocks as one call and compiles what is around it. Unrolled, the loop would
    be more code than the rest of the model: 135 s of compiling for 4 layers instead of 58, and it ran no faster.
    """

    qkv = "Tensor q, Tensor k, Tensor v"
    schema = f"({qkv}, int window, bool save_weights) -> (Tensor, Tensor, Tensor)"
    forward = torch.library.custom_op("nanochat::blocks", blocks_forward, mutates_args=(), schema=schema)
    schema = f"(Tensor dy, Tensor dsums, {qkv}, Tensor saved, int window) -> (Tensor, Tensor, Tensor)"
    backward = torch.library.custom_op("nanochat::blocks_backward", blocks_backward, mutates_args=(), schema=schema)

    @forward.register_fake
    def _(q, k, v, window, save_weights):
        sums = q.new_empty((*q.shape[:3], 1), dtype=torch.float32)
        return torch.empty_like(q), sums, q.new_empty(_num_weights(q, window) if save_weights else 0)

    @backward.register_fake
    def _(dy, dsums, q, k, v, saved, window):
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        q, k, v, window, _ = inputs
        ctx.window = window
        ctx.save_for_backward(q, k, v, output[2])

    def differentiate(ctx: Any, dy: torch.Tensor, dsums: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        dq, dk, dv = backward(dy.contiguous(), dsums.contiguous(), *ctx.saved_tensors, ctx.window)
        return dq, dk, dv, None, None

    forward.register_autograd(differentiate, setup_context=setup_context)

    def attend_blocks(q_BTHD: torch.Tensor, k_BTKD: torch.Tensor, v_BTKD: torch.Tensor, window: int) -> torch.Tensor:
        if q_BTHD.dtype == torch.float16:
            raise TypeError("float16 cannot hold exp(scores)")
        B, T, H, D = q_BTHD.shape
        q = _to_blocks(q_BTHD * D**-0.5, H)
        save_weights = torch.is_grad_enabled() and _num_weights(q, window) <= SAVED_WEIGHTS
        y, sums, _ = forward(q, _to_blocks(k_BTKD, H), _to_blocks(v_BTKD, H), window, save_weights)
        y_mBHtD = (y / sums).to(q_BTHD.dtype).unflatten(1, (B, H))
        return y_mBHtD.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :T]

    return attend_blocks


def blocks_forward(q, k, v, window: int, save_weights: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Attention of q, k, v (m, N, t, D), where q is already scaled. Returns the unnormalised output exp(scores) @ v
    (m, N, t, D), the softmax denominators (m, N, t, 1) in float32, and the weights exp(scores) of all tiles in one flat
    tensor, which is empty without save_weights.
    """
    y = torch.empty_like(q)
    sums = q.new_empty((*q.shape[:3], 1), dtype=torch.float32)
    saved = q.new_empty(_num_weights(q, window) if save_weights else 0)
    for tile in _tiles(q, window):
        out = saved[tile.weights] if save_weights else None
        weights = _weights(q[tile.block, tile.heads], _join(k[tile.keys, tile.heads]), tile.mask, out)
        torch.sum(weights, dim=-1, keepdim=True, dtype=torch.float32, out=sums[tile.block, tile.heads])
        torch.bmm(weights, _join(v[tile.keys, tile.heads]), out=y[tile.block, tile.heads])
    return y, sums, saved


def blocks_backward(dy, dsums, q, k, v, saved, window: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v from those of the output and of the denominators. Weights not saved are recomputed."""
    dq = torch.empty_like(q)
    dk = torch.zeros_like(k, dtype=torch.float32)
    dv = torch.zeros_like(v, dtype=torch.float32)
    dsums = dsums.to(q.dtype)
    for tile in _tiles(q, window):
        q_ntD, dy_ntD = q[tile.block, tile.heads], dy[tile.block, tile.heads]
        k_nsD, v_nsD = _join(k[tile.keys, tile.heads]), _join(v[tile.keys, tile.heads])
        if saved.numel():
            weights = saved[tile.weights].view(q_ntD.size(0), *tile.mask.shape)
        else:
            weights = _weights(q_ntD, k_nsD, tile.mask)
        dv[tile.keys, tile.heads] += _split(torch.bmm(weights.mT, dy_ntD))
        dscores = torch.bmm(dy_ntD, v_nsD.mT).add_(dsums[tile.block, tile.heads]).mul_(weights)
        torch.bmm(dscores, k_nsD, out=dq[tile.block, tile.heads])
        dk[tile.keys, tile.heads] += _split(torch.bmm(dscores.mT, q_ntD))
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _weights(q_ntD, k_nsD, mask_ts, out: torch.Tensor | None = None) -> torch.Tensor:
    """exp(scores), 0 where the mask is 0: (n, t, s)."""
    if out is not None:
        out = out.view(q_ntD.size(0), *mask_ts.shape)
    return torch.bmm(q_ntD, k_nsD.mT, out=out).exp_().mul_(mask_ts)


class Tile(NamedTuple):
    """One step of the loops: a block of queries, for some heads, and everything that these see."""

    block: int  # of queries
    keys: slice  # blocks of keys that any of these queries sees
    heads: slice
    mask: torch.Tensor  # (t, s): 1 where a query sees a key, else 0
    weights: slice  # of the flat tensor of saved weights


def _tiles(q_mNtD: torch.Tensor, window: int) -> Iterator[Tile]:
    num_blocks, num_heads = q_mNtD.shape[:2]
    weights_start = 0
    for block in range(num_blocks):
        first_block = max(block * BLOCK - window, 0) // BLOCK
        start, stop = block * BLOCK, (block + 1) * BLOCK
        mask = band_mask(torch.arange(start, stop), first_block * BLOCK, stop, window).to(q_mNtD.dtype)
        num_groups = math.ceil(num_heads * mask.numel() / CACHED_SCORES)
        heads_at_a_time = math.ceil(num_heads / num_groups)
        for first_head in range(0, num_heads, heads_at_a_time):
            heads = slice(first_head, min(first_head + heads_at_a_time, num_heads))
            weights_stop = weights_start + (heads.stop - heads.start) * mask.numel()
            yield Tile(block, slice(first_block, block + 1), heads, mask, slice(weights_start, weights_stop))
            weights_start = weights_stop


def _num_weights(q_mNtD: torch.Tensor, window: int) -> int:
    m, N, t, _ = q_mNtD.shape
    num_pairs = sum(i + 1 - max(i * t - window, 0) // t for i in range(m))  # of a block of queries and one of keys
    return N * t * t * num_pairs


def _to_blocks(x_BTKD: torch.Tensor, num_heads: int) -> torch.Tensor:
    """(B, T, K, D) → (m, B * H, t, D): padded with zeros after the end, key/value heads repeated for their queries."""
    group = num_heads // x_BTKD.size(2)
    x_BTHD = x_BTKD.repeat_interleave(group, dim=2) if group > 1 else x_BTKD
    padding = -x_BTHD.size(1) % BLOCK
    if padding:
        x_BTHD = F.pad(x_BTHD, (0, 0, 0, 0, 0, padding))
    return x_BTHD.unflatten(1, (-1, BLOCK)).permute(1, 0, 3, 2, 4).contiguous().flatten(1, 2)


def _join(x_mntD: torch.Tensor) -> torch.Tensor:
    """Blocks side by side: (n, m * t, D)."""
    return x_mntD.transpose(0, 1).flatten(1, 2).contiguous()


def _split(x_nsD: torch.Tensor) -> torch.Tensor:
    """The inverse of _join."""
    return x_nsD.unflatten(1, (-1, BLOCK)).transpose(0, 1)
