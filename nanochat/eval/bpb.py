"""Bits per byte: the loss per byte of text instead of per token, so that tokenizers can be compared."""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from nanochat.dataloader import Batch, PretrainLoader
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
    num_streams: int = 1,
) -> dict[str, float]:
    """
    Returns bits per byte of text that takes its tokens from the sources in the proportions of their weights, as "bpb".
    With several sources it also returns those of each source, as "bpb/<name>".

    num_streams: the text is read as this many streams (dataloader.py), and does not depend on the number of ranks: the
    result does by rounding only. With fewer streams than ranks, a rank also tokenizes and packs what others evaluate,
    which is too slow during training.
    """
    T = model.config.sequence_len
    num_batches = max(1, num_tokens // (batch_size * T * num_streams))  # per stream
    bpb = {}
    mean_nats = mean_bytes = 0.0  # per token of the mixture
    for name, weight, shards in sources:
        streams = [
            PretrainLoader(
                tokenizer,
                RowGroups(shards),
                batch_size=batch_size,
                sequence_len=T,
                dist=Dist(dist.device, number, num_streams),
            )
            for number in range(num_streams)
        ]
        of_stream = max(1, round(weight * num_batches))
        batches = _own_batches(streams, of_stream, dist)
        of_rank = num_streams * of_stream / dist.world_size
        counted = track(batches, f"bits per byte of {name}", of_rank, "batches")
        nats, num_bytes, num_targets = _sums(model, counted, tokenizer.token_bytes(), dist)
        bpb[f"bpb/{name}"] = _bits_per_byte(nats, num_bytes)
        mean_nats += weight * nats / num_targets
        mean_bytes += weight * num_bytes / num_targets
    if len(sources) == 1:
        return {"bpb": bpb[f"bpb/{sources[0][0]}"]}
    return {"bpb": _bits_per_byte(mean_nats, mean_bytes)} | bpb


def _own_batches(streams: Sequence[PretrainLoader], num_batches: int, dist: Dist) -> Iterator[Batch]:
    """
    This rank's share of the first num_batches of each stream. Every rank gets the same number of batches, as a sharded
    model needs all ranks to compute anything: the last ranks may get batches without targets.
    """
    num_own = math.ceil(len(streams) * num_batches / dist.world_size)
    first = dist.rank * num_own  # of all streams, one after the other
    last = min(first + num_own, len(streams) * num_batches)
    for number, stream in enumerate(streams):
        skipped = max(first - number * num_batches, 0)
        end = min(last - number * num_batches, num_batches)
        if skipped < end:
            yield from islice(stream.batches(), skipped, end)
    for _ in range(num_own - max(last - first, 0)):
        x_BT = torch.zeros(streams[0].batch_size, streams[0].sequence_len, dtype=torch.int64)
        yield x_BT, torch.full_like(x_BT, -1)


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
