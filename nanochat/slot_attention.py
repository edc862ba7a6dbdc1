"""
Attention in a decode step: the slots of the decoder (decoder.py) as the KV cache of the model's forward pass.

Shapes: B slots in a step, T tokens of each (1, or more with drafts), S keys of a ring, P keys of a shared prompt,
X = P + S; K key/value heads, G query heads for each of them, D head size, N = B * K.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from nanochat.attention import small_products
from nanochat.shared_prompts import LayerPrompts, StepPrompts


class StepInputs(NamedTuple):
    """What the forward pass of a step reads."""

    tokens_BT: torch.Tensor
    positions_BT: torch.Tensor  # in the context
    previous_B1: torch.Tensor  # the token before the first one of each row
    keys: list[torch.Tensor]  # by layer, (B * K, S, D): the first S entries of the rings of the active slots
    values: list[torch.Tensor]
    ring_lengths_L: torch.Tensor  # by layer
    prompts: list[torch.Tensor]  # from SharedPrompts.tensors; empty if prompts are not shared


class SlotCache:
    """
    The active slots as the KV cache of one forward pass (gpt.Cache).

    A layer's keys and values are a ring: those of position p are stored at p modulo the ring's length. Keys are already
    rotated, so their order does not matter. With shared prompts, positions in the ring begin after the prompt.
    """

    def __init__(self, inputs: StepInputs, attend_rows: Callable[..., torch.Tensor]):
        _, self.positions_BT, self.previous_B1, self.keys, self.values, self.ring_lengths_L, prompts = inputs
        self.attend_rows = attend_rows
        self.prompts = StepPrompts(prompts) if prompts else None
        self.ring_positions_BT = self.positions_BT
        if self.prompts is not None:
            self.ring_positions_BT = self.positions_BT - self.prompts.lengths_B[:, None]
        self.rings: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by window: layers with one have equal rings

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        """Writes the new keys and values, (B, T, K, D), and returns the attention of the queries (B, T, H, D)."""
        B, T, K, D = k.shape
        keys, values = self.keys[layer], self.values[layer]
        indices_NT, mask_NGX = self._ring(layer, window, num_kv_heads=K, num_groups=q.size(2) // K)
        rows_N1 = torch.arange(B * K, device=k.device)[:, None]
        keys[rows_N1, indices_NT] = k.transpose(1, 2).reshape(B * K, T, D).to(keys.dtype)
        values[rows_N1, indices_NT] = v.transpose(1, 2).reshape(B * K, T, D).to(values.dtype)

        q = (q / math.sqrt(D)).to(keys.dtype)
        q_NGD = q.unflatten(2, (K, -1)).permute(0, 2, 3, 1, 4).reshape(B * K, -1, D)  # G * T queries per row
        prompts = None if self.prompts is None else self.prompts.layer(layer)
        y_NGD = self.attend_rows(q_NGD, keys, values, mask_NGX, prompts)
        return y_NGD.view(B, K, -1, T, D).permute(0, 3, 1, 2, 4).reshape(B, T, -1, D).to(v.dtype)

    def _ring(
        self, layer: int, window: int, *, num_kv_heads: int, num_groups: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Where the new keys of a layer go, (N, T), and what is added to the scores: 0, or minus infinity for entries that
        a query does not see, (N, G * T, X), or (N, 1, X) for a single token.
        """
        ring, size = self.ring_lengths_L[layer], self.keys[layer].size(1)
        if window not in self.rings:
            positions_BT1 = self.ring_positions_BT[:, :, None]
            entries_S = torch.arange(size, device=positions_BT1.device)
            age_BTS = (positions_BT1 - entries_S) % ring  # distance of the query to the last position stored there
            is_hidden_BTS = age_BTS > positions_BT1.clamp(max=window)
            if self.prompts is not None:
                in_prompt_BTP = self.prompts.is_hidden(layer, self.ring_positions_BT, window)
                is_hidden_BTS = torch.cat([in_prompt_BTP, is_hidden_BTS], dim=-1)
            mask_BTX = torch.zeros(is_hidden_BTS.shape, device=age_BTS.device).masked_fill(is_hidden_BTS, -torch.inf)
            if mask_BTX.size(1) > 1:
                mask_BTX = mask_BTX.repeat(1, num_groups, 1)
            self.rings[window] = (
                (self.ring_positions_BT % ring).repeat_interleave(num_kv_heads, dim=0),
                mask_BTX.repeat_interleave(num_kv_heads, dim=0),
            )
        return self.rings[window]


# ---- formulas for the attention of all rows ----


def attend_by_products(
    q_NGD: torch.Tensor,  # G * T queries per row
    keys_NSD: torch.Tensor,
    values_NSD: torch.Tensor,
    mask_NGX: torch.Tensor,
    prompts: LayerPrompts | None = None,
) -> torch.Tensor:
    """
    Attention as two matrix products. On CUDA the scores of 16-bit queries and keys are float32, as in the kernels that
    train: rounded to bfloat16, a score of 16 is off by up to 0.06, and so is the logarithm of its probability.
    """
    P = mask_NGX.size(2) - keys_NSD.size(1)
    is_half_on_cuda = keys_NSD.is_cuda and keys_NSD.dtype != torch.float32
    options: dict[str, Any] = {"out_dtype": torch.float32} if is_half_on_cuda else {}
    with small_products():
        scores = torch.baddbmm(mask_NGX[..., P:], q_NGD, keys_NSD.transpose(1, 2), **options)
        if prompts is None:
            return torch.bmm(scores.softmax(dim=-1).to(values_NSD.dtype), values_NSD)
        scores = torch.cat([prompts.scores(q_NGD) + mask_NGX[..., :P], scores], dim=-1)
        weights = scores.softmax(dim=-1)
        y_ring = torch.bmm(weights[..., P:].to(values_NSD.dtype), values_NSD)
        return y_ring + prompts.weighted_sum(weights[..., :P])


def attend_by_sums(
    q_NGD: torch.Tensor,
    keys_NSD: torch.Tensor,
    values_NSD: torch.Tensor,
    mask_NGX: torch.Tensor,
    prompts: LayerPrompts | None = None,
) -> torch.Tensor:
    """
    The same as sums over elementwise products, which torch.compile turns into loops that read each key and value once,
    in 16 bits too. With one query per key, matrix products have no advantage.
    """
    weights = _scores_by_sums(q_NGD, keys_NSD, mask_NGX, prompts).softmax(dim=-1)
    return _weighted_sum(weights, values_NSD, prompts)


def attend_without_maximum(
    q_NGD: torch.Tensor,
    keys_NSD: torch.Tensor,
    values_NSD: torch.Tensor,
    mask_NGX: torch.Tensor,
    prompts: LayerPrompts | None = None,
) -> torch.Tensor:
    """
    attend_by_sums in two kernels on CUDA instead of three.

    Queries and keys are normed, so no score exceeds gain² sqrt(D), 16 at head size 128: softmax need not subtract the
    maximum first. The sum of the weights is computed once per channel, in the loop that adds up the values.
    """
    weights = _scores_by_sums(q_NGD, keys_NSD, mask_NGX, prompts).exp()
    if prompts is not None:
        return _weighted_sum(weights / weights.sum(dim=-1, keepdim=True), values_NSD, prompts)
    weights_NGSD = weights[..., None].expand(*weights.shape, values_NSD.size(2))
    return (weights_NGSD * values_NSD[:, None].float()).sum(dim=2) / weights_NGSD.sum(dim=2)


def _scores_by_sums(
    q_NGD: torch.Tensor, keys_NSD: torch.Tensor, mask_NGX: torch.Tensor, prompts: LayerPrompts | None
) -> torch.Tensor:
    """(N, G * T, X), masked."""
    scores = (q_NGD[:, :, None].float() * keys_NSD[:, None].float()).sum(dim=-1)
    if prompts is not None:
        scores = torch.cat([prompts.scores(q_NGD), scores], dim=-1)
    return scores + mask_NGX


def _weighted_sum(weights_NGX: torch.Tensor, values_NSD: torch.Tensor, prompts: LayerPrompts | None) -> torch.Tensor:
    """(N, G * T, D)."""
    P = weights_NGX.size(2) - values_NSD.size(1)
    y = (weights_NGX[..., P:, None] * values_NSD[:, None].float()).sum(dim=2)
    return y if prompts is None else y + prompts.weighted_sum(weights_NGX[..., :P])
