"""
Straightforward generation, the baseline of the benchmarks `infer` and `rollout`: the model's own forward pass with a
preallocated KV cache, one row per sequence, every row from the first to the last step, and torch.multinomial.

Shapes: B sequences of equal length, T new tokens, K key/value heads, D head size, V vocabulary.
"""

import torch
import torch.nn.functional as F

from nanochat.gpt import GPT


class PlainCache:
    """The KV cache of sequences of equal length. Prompts must not be longer than the shortest window."""

    def __init__(self, model: GPT, B: int, length: int):
        config = model.config
        shape = (config.n_layer, B, config.n_kv_head, length, config.head_dim)
        self.model = model
        self.keys = torch.zeros(shape, device=model.device, dtype=model.dtype)
        self.values = torch.zeros(shape, device=model.device, dtype=model.dtype)
        self.previous_B1C = torch.zeros(B, 1, config.n_embd, device=model.device, dtype=model.dtype)
        self.start = 0  # tokens read so far

    def read(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Reads the next tokens of every sequence; returns the logits (B, V) after the last one."""
        self.stop = self.start + ids_BT.size(1)
        self.positions_BT = torch.arange(self.start, self.stop, device=ids_BT.device)[None]
        logits_BV = self.model.logits(self.model.hidden(ids_BT, self)[:, -1])
        self.start = self.stop
        return logits_BV

    def repeat(self, num_rows: int) -> None:
        """Turns the cache of one sequence into that of num_rows equal ones."""
        self.keys = self.keys.repeat(1, num_rows, 1, 1, 1)
        self.values = self.values.repeat(1, num_rows, 1, 1, 1)
        self.previous_B1C = self.previous_B1C.repeat(num_rows, 1, 1)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        """The attention of one layer, called by the model."""
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        self.keys[layer, :, :, self.start : self.stop] = k
        self.values[layer, :, :, self.start : self.stop] = v
        first = max(0, self.start - window)
        keys = self.keys[layer, :, :, first : self.stop]
        values = self.values[layer, :, :, first : self.stop]
        y = F.scaled_dot_product_attention(q, keys, values, is_causal=q.size(2) > 1, enable_gqa=q.size(1) != k.size(1))
        return y.transpose(1, 2)


def sample_next(logits_BV: torch.Tensor, temperature: float, top_k: int) -> torch.Tensor:
    """Samples the next token of each row, (B, 1); temperature 0 = greedy, top_k 0 = all tokens."""
    if temperature == 0:
        return logits_BV.argmax(dim=-1, keepdim=True)
    vocab_size = logits_BV.size(1)
    best_Bk, ids_Bk = logits_BV.topk(min(top_k or vocab_size, vocab_size))
    return ids_Bk.gather(1, torch.multinomial((best_Bk / temperature).softmax(dim=-1), 1))
