"""Bits per byte: the loss per byte of text rather than per token, so that tokenizers can be compared."""

import math
from collections.abc import Iterable

import torch

from nanochat.distributed import Dist


@torch.no_grad()
def evaluate_bpb(
    model: torch.nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    token_bytes: torch.Tensor,
    dist: Dist,
) -> float:
    """
    Total nats over total bytes, in bits, over all ranks' batches of inputs and targets (B, T). Targets that stand for
    no text count on neither side: special tokens (0 bytes in `token_bytes`, (V,)) and those of -1.
    """
    token_bytes = token_bytes.to(dist.device)
    totals = torch.zeros(2, dtype=torch.float64 if dist.device.type != "mps" else torch.float32, device=dist.device)
    for x_BT, y_BT in batches:
        x_BT, y_BT = x_BT.to(dist.device, non_blocking=True), y_BT.to(dist.device, non_blocking=True)
        nats_BT = model(x_BT, y_BT, reduction="none")
        bytes_BT = token_bytes[y_BT.clamp_min(0)] * (y_BT >= 0)
        totals[0] += (nats_BT * (bytes_BT > 0)).sum()
        totals[1] += bytes_BT.sum()
    nats, num_bytes = dist.sum(totals).tolist()
    return nats / (math.log(2) * num_bytes) if num_bytes else math.nan
