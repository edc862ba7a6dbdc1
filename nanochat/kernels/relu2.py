"""
The MLP with relu² inside its matrix products, by Triton, for CUDA GPUs. nanochat/kernels/mlp.py chooses it if it is
faster than the plain formula.

Between the two products of an MLP the plain formula reads and writes (M, N) six times more than needed: relu² after the
first product, again in the backward pass, and its derivative. Here the first product writes relu(h)² at once, and the
product of the backward pass multiplies by the derivative before it writes:

    forward    a = relu(x W1ᵀ)²                y = a W2ᵀ
    backward   dh = (dy W2) * 2 relu(h)        with relu(h) = sqrt(a), so that h need not be kept

Both are one kernel. At depth 24 with 16 rows of 2,048 tokens the saving is 6 x 403 MB per layer, about 0.9 ms of the
2.2 ms that the two products take on an H100 (estimated from 2.8 TB/s and 570 TFLOP/s): the kernel is faster if it
reaches 0.72 of cuBLAS's rate. Which it does on a card has not been measured.

Shapes: M rows (tokens), C channels, N = 4 C hidden channels of the MLP. Needs C to be a multiple of MULTIPLE.
"""

from typing import Any

import torch
import triton
import triton.language as tl

MULTIPLE = 64  # of C: so no tile reaches over the edge, except that of the last rows
GROUP_M = 8  # tiles of rows that share a tile of columns in the L2 cache
# Tiles (rows, columns, depth), warps, stages of the pipeline. The large ones need 144 KiB of shared memory, which A100,
# H100 and B200 have; consumer cards have 99 KiB. Neither spills registers (ptxas for sm_80, sm_89 and sm_90a).
LARGE_TILES = (128, 256, 64, 8, 3)
SMALL_TILES = (128, 128, 32, 8, 4)
LARGE_TILES_BYTES = 144 * 1024


@triton.jit
def _product(
    a_ptr, b_ptr, act_ptr, out_ptr, M, stride_bk, stride_bn, N: tl.constexpr, K: tl.constexpr,
    IS_BACKWARD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of out (M, N): relu(a b)², or with IS_BACKWARD (a b) * 2 sqrt(act). a (M, K) and act are row-major."""
    num_tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_per_group = GROUP * (N // BLOCK_N)
    tile = tl.program_id(0)
    first_m = tile // tiles_per_group * GROUP
    group_size = tl.minimum(num_tiles_m - first_m, GROUP)
    tile_m = first_m + tile % tiles_per_group % group_size
    tile_n = tile % tiles_per_group // group_size

    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)  # 64 bits: M * N may exceed 2³¹
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + (rows % M)[:, None] * K + ks[None, :]  # rows below the last one are read as others, not written
    b_ptrs = b_ptr + ks[:, None] * stride_bk + columns[None, :] * stride_bn
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for _ in range(K // BLOCK_K):
        total = tl.dot(tl.load(a_ptrs), tl.load(b_ptrs), total)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K * stride_bk

    offsets = rows[:, None] * N + columns[None, :]
    mask = (rows < M)[:, None]
    if IS_BACKWARD:
        act = tl.load(act_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        total = total * 2 * tl.sqrt(act)
    else:
        total = tl.maximum(total, 0.0)
        total = total * total
    tl.store(out_ptr + offsets, total.to(out_ptr.dtype.element_ty), mask=mask)


def _launch(a_MC: torch.Tensor, b_CN: torch.Tensor, act_MN: torch.Tensor | None) -> torch.Tensor:
    M, C = a_MC.shape
    N = b_CN.size(1)
    out_MN = a_MC.new_empty(M, N)
    large = a_MC.is_cuda and _shared_memory(a_MC.device) >= LARGE_TILES_BYTES
    block_m, block_n, block_k, num_warps, num_stages = LARGE_TILES if large else SMALL_TILES
    grid = (triton.cdiv(M, block_m) * (N // block_n),)
    _product[grid](
        a_MC, b_CN, out_MN if act_MN is None else act_MN, out_MN, M, *b_CN.stride(), N, C, act_MN is not None,
        block_m, block_n, block_k, GROUP_M, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return out_MN


def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one block of threads may use."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]


@torch.library.custom_op("nanochat::relu2_linear", mutates_args=())
def relu2_linear(x_MC: torch.Tensor, w1_NC: torch.Tensor) -> torch.Tensor:
    """relu(x W1ᵀ)², (M, N)."""
    return _launch(x_MC, w1_NC.T, None)


@torch.library.custom_op("nanochat::relu2_linear_backward", mutates_args=())
def relu2_linear_backward(dy_MC: torch.Tensor, w2_CN: torch.Tensor, a_MN: torch.Tensor) -> torch.Tensor:
    """(dy W2) * 2 sqrt(a), (M, N): the gradient of x W1ᵀ."""
    return _launch(dy_MC, w2_CN, a_MN)


@relu2_linear.register_fake
def _(x_MC, w1_NC):
    return x_MC.new_empty(x_MC.size(0), w1_NC.size(0))


@relu2_linear_backward.register_fake
def _(dy_MC, w2_CN, a_MN):
    return torch.empty_like(a_MN)


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MC, w1_NC, w2_CN):
        a_MN = relu2_linear(x_MC, w1_NC)
        ctx.save_for_backward(x_MC, w1_NC, w2_CN, a_MN)
        return a_MN @ w2_CN.T

    @staticmethod
    def backward(ctx: Any, dy_MC):
        x_MC, w1_NC, w2_CN, a_MN = ctx.saved_tensors
        dy_MC = dy_MC.contiguous()
        dh_MN = relu2_linear_backward(dy_MC, w2_CN, a_MN)
        return dh_MN @ w1_NC, dh_MN.T @ x_MC, dy_MC.T @ a_MN


def mlp(x: torch.Tensor, w1_NC: torch.Tensor, w2_CN: torch.Tensor) -> torch.Tensor:
    """relu(x W1ᵀ)² W2ᵀ of x (…, C), in bfloat16. The arguments are contiguous."""
    return _Mlp.apply(x.reshape(-1, x.size(-1)), w1_NC, w2_CN).view(x.shape)
