"""Attention kernels that need wrapping, for nanochat/attention.py, which chooses among them."""

from collections.abc import Callable

import torch

# (q (B, T, H, D), k (B, T, K, D), v (B, T, K, D), window) → (B, T, H, D): each sequence attends to itself.
Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]
