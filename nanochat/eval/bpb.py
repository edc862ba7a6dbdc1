"""Bits per byte: the loss per byte of text instead of per token, so that tokenizers can be compared."""

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
    Returns bits per byte = (sum of losses in nats) / (ln 2 · sum of bytes), over the batches of all ranks; NaN if they
    hold no bytes. A batch is a pair of inputs and targets, (B, T) each. `token_bytes`, (V,), has the length of each
    token. Special tokens (0 bytes) and ignored targets (-1) count in neither sum.
    """
    token_bytes = token_bytes.to(dist.device)
    sum_dtype = torch.float64 if dist.device.type != "mps" else torch.float32  # MPS has no float64
    totals = torch.zeros(2, dtype=sum_dtype, device=dist.device)  # nats, bytes
    for x_BT, y_BT in batches:
        x_BT = x_BT.to(dist.device, non_blocking=True)
        y_BT = y_BT.to(dist.device, non_blocking=True)
        nats_BT = model(x_BT, y_BT, reduction="none")
        bytes_BT = token_bytes[y_BT.clamp_min(0)] * (y_BT >= 0)
        totals[0] += (nats_BT * (bytes_BT > 0)).sum()
        totals[1] += bytes_BT.sum()
    nats, num_bytes = dist.sum(totals).tolist()
    return nats / (math.log(2) * num_bytes) if num_bytes else math.nan
