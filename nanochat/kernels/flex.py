"""
FlexAttention, which torch.compile turns into a Triton kernel that skips the blocks outside the window. For GPUs that
Triton supports and FlashAttention does not. On a CPU it has no backward pass.
"""

import torch

from nanochat.kernels import Kernel


def load_flex() -> Kernel:
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    masks: dict[tuple[int, int], BlockMask] = {}  # by T and window; attention.probe fills in those of training

    def attend_flex(q_BTHD: torch.Tensor, k_BTKD: torch.Tensor, v_BTKD: torch.Tensor, window: int) -> torch.Tensor:
        q, k, v = q_BTHD.transpose(1, 2), k_BTKD.transpose(1, 2), v_BTKD.transpose(1, 2)
        T = q.size(2)
        if (T, window) not in masks:

            def is_visible(b, h, query, key):
                return (query >= key) & (query - key <= window)

            masks[T, window] = create_block_mask(is_visible, None, None, T, T, device=str(q.device))
        y = compiled(q, k, v, block_mask=masks[T, window], enable_gqa=q.size(1) != k.size(1))
        return y.transpose(1, 2)

    return attend_flex
