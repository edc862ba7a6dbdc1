"""Attention kernels that need wrapping, for nanochat/attention.py, which chooses among them."""

from collections.abc import Callable

import torch

# (q (B, T, H, D), k (B, T, K, D), v (B, T, K, D), window) → (B, T, H, D): each sequence attends to itself.
Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]


def band_mask(positions: torch.Tensor, first_key: int, stop_key: int, window: int) -> torch.Tensor:
    """(…, T, S): true where a query at one of the positions (…, T) sees a key of first_key … stop_key - 1."""
    distance = positions.unsqueeze(-1) - torch.arange(first_key, stop_key, device=positions.device)
    return (distance >= 0) & (distance <= window)
