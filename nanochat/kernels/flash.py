"""
FlashAttention for CUDA GPUs (arXiv 2205.14135): version 2 as included in torch, 3 and 4 from the packages of
https://github.com/Dao-AILab/flash-attention. attention.choose takes the first that works.

For a window that reaches the whole sequence the packages expect -1 or None instead of a number.
"""

from collections.abc import Callable
from typing import Any

import torch

from nanochat.kernels import Kernel


def attend_flash2(q_BTHD: torch.Tensor, k_BTKD: torch.Tensor, v_BTKD: torch.Tensor, window: int) -> torch.Tensor:
    """
    FlashAttention-2 as it comes with torch ("flash"), for 16 bits and compute capability 8.0. SDPA does not pass
    windows to it; the operator below SDPA takes them, has a backward pass and works in torch.compile.
    """
    T = q_BTHD.size(1)
    return torch.ops.aten._flash_attention_forward(
        q_BTHD, k_BTKD, v_BTKD, None, None, T, T, 0.0, True, False,
        window_size_left=_left_window(q_BTHD, window, full=-1), window_size_right=0,
    )[0]  # fmt: skip


def load_flash3() -> Kernel:
    """FlashAttention-3, for Hopper. ImportError if flash_attn_interface is not installed."""
    import flash_attn_interface as fa3

    def forward(q, k, v, window):
        left = _left_window(q, window, full=-1)
        output, lse, *_ = fa3.flash_attn_func(q, k, v, causal=True, window_size=(left, 0), return_attn_probs=True)
        return output, lse

    def backward(grad, q, k, v, output, lse, window):
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        no_varlen = [None] * 6  # arguments for packed sequences
        scale, left = q.size(-1) ** -0.5, _left_window(q, window, full=-1)
        fa3._flash_attn_backward(grad, q, k, v, output, lse, *no_varlen, dq, dk, dv, scale, True, left, 0)
        return dq, dk, dv

    return as_operator("fa3", forward, backward)


def load_flash4() -> Kernel:
    """FlashAttention-4, for Hopper and Blackwell. ImportError if flash_attn.cute is not installed."""
    from flash_attn.cute import interface as fa4

    def forward(q, k, v, window):
        left = _left_window(q, window, full=None)
        output, lse, *_ = fa4.flash_attn_func(q, k, v, causal=True, window_size=(left, None), return_lse=True)
        return output, lse

    def backward(grad, q, k, v, output, lse, window):
        left = _left_window(q, window, full=None)
        dq, dk, dv = fa4._flash_attn_bwd(q, k, v, output, grad, lse, causal=True, window_size_left=left)
        return dq, dk, dv

    return as_operator("fa4", forward, backward)


def _left_window(q_BTHD: torch.Tensor, window: int, full: int | None) -> int | None:
    """The window, or `full` if it reaches the start of the sequence from its last token."""
    return window if window < q_BTHD.size(1) - 1 else full


def as_operator(name: str, run_forward: Callable[..., Any], run_backward: Callable[..., Any]) -> Kernel:
    """
    Registers foreign code as the operators nanochat::<name> and nanochat::<name>_backward, which torch.compile puts
    into its graph unchanged, and returns a kernel that calls them.

    run_forward:  (q, k, v, window) → output, and the logarithm of the softmax denominators (B, H, T) in float32
    run_backward: (grad, q, k, v, output, lse, window) → gradients of q, k, v

    Their inputs are contiguous, and their outputs must be.
    """

    qkv = "Tensor q, Tensor k, Tensor v"
    schema = f"({qkv}, int window) -> (Tensor, Tensor)"
    forward = torch.library.custom_op(f"nanochat::{name}", run_forward, mutates_args=(), schema=schema)
    schema = f"(Tensor grad, {qkv}, Tensor output, Tensor lse, int window) -> (Tensor, Tensor, Tensor)"
    backward = torch.library.custom_op(f"nanochat::{name}_backward", run_backward, mutates_args=(), schema=schema)

    @forward.register_fake
    def _(q, k, v, window):
        B, T, H, _ = q.shape
        return q.new_empty(q.shape), q.new_empty((B, H, T), dtype=torch.float32)

    @backward.register_fake
    def _(grad, q, k, v, output, lse, window):
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        q, k, v, window = inputs
        ctx.window = window
        ctx.save_for_backward(q, k, v, *output)

    def differentiate(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dq, dk, dv = backward(grad.contiguous(), *ctx.saved_tensors, ctx.window)
        return dq, dk, dv, None

    forward.register_autograd(differentiate, setup_context=setup_context)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        return forward(q.contiguous(), k.contiguous(), v.contiguous(), window)[0]

    return attend
