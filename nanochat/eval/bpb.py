"""Bits per byte: the loss per byte of text instead of per token, so that tokenizers can be compared."""

import math
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from nanochat.dataloader import PretrainLoader
from nanochat.dataset import RowGroups
from nanochat.distributed import Dist
from nanochat.progress import track
from nanochat.tokenizer import Tokenizer


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
    nats, num_bytes, _ = _sums(model, track(batches, "bits per byte", unit="batches"), token_bytes, dist)
    return _bits_per_byte(nats, num_bytes)


def evaluate_bpb_of_sources(
    model: Any,  # a GPT, compiled or not
    tokenizer: Tokenizer,
    sources: Sequence[tuple[str, float, Sequence[Path]]],  # name, weight and shards of a split
    *,
    batch_size: int,
    num_tokens: int,  # over all sources and ranks
    dist: Dist,
    same_text: bool = False,
) -> dict[str, float]:
    """
    Returns bits per byte of text that takes its tokens from the sources in the proportions of their weights, as "bpb".
    With several sources it also returns those of each source, as "bpb/<name>".

    same_text: any number of ranks evaluates the text that one rank does, and differs from it by rounding only. To that
    end each rank tokenizes and packs all of it. That is too slow during training, where the ranks read different texts.
    """
    T = model.config.sequence_len
    rank, world_size = (dist.rank, dist.world_size) if same_text else (0, 1)
    reader = Dist(dist.device) if same_text else dist
    num_batches = max(1, num_tokens // (batch_size * T * reader.world_size))
    bpb = {}
    mean_nats = mean_bytes = 0.0  # per token of the mixture
    for name, weight, shards in sources:
        loader = PretrainLoader(tokenizer, RowGroups(shards), batch_size=batch_size, sequence_len=T, dist=reader)
        num_own = max(1, round(weight * num_batches))
        batches = islice(loader.batches(), rank, num_own, world_size)
        counted = track(batches, f"bits per byte of {name}", num_own / world_size, "batches")
        nats, num_bytes, num_targets = _sums(model, counted, tokenizer.token_bytes(), dist)
        bpb[f"bpb/{name}"] = _bits_per_byte(nats, num_bytes)
        mean_nats += weight * nats / num_targets
        mean_bytes += weight * num_bytes / num_targets
    if len(sources) == 1:
        return {"bpb": bpb[f"bpb/{sources[0][0]}"]}
    return {"bpb": _bits_per_byte(mean_nats, mean_bytes)} | bpb


@torch.no_grad()
def _sums(
    model: torch.nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    token_bytes: torch.Tensor,
    dist: Dist,
) -> tuple[float, float, float]:
    """The losses in nats, the bytes of the targets and their number, each summed over the batches of all ranks."""
    token_bytes = token_bytes.to(dist.device)
    sum_dtype = torch.float64 if dist.device.type != "mps" else torch.float32  # MPS has no float64
    totals = torch.zeros(3, dtype=sum_dtype, device=dist.device)
    for x_BT, y_BT in batches:
        x_BT = x_BT.to(dist.device, non_blocking=True)
        y_BT = y_BT.to(dist.device, non_blocking=True)
        nats_BT = model(x_BT, y_BT, reduction="none")
        is_target_BT = y_BT >= 0
        bytes_BT = token_bytes[y_BT.clamp_min(0)] * is_target_BT
        totals[0] += (nats_BT * (bytes_BT > 0)).sum()
        totals[1] += bytes_BT.sum()
        totals[2] += is_target_BT.sum()
    nats, num_bytes, num_targets = dist.sum(totals).tolist()
    return nats, num_bytes, num_targets


def _bits_per_byte(nats: float, num_bytes: float) -> float:
    return nats / (math.log(2) * num_bytes) if num_bytes else math.nan
