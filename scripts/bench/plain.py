"""
Straightforward generation, the baselines of the benchmarks `infer` and `rollout`. All of them call the model's own
forward pass, uncompiled, with a preallocated KV cache of one row per sequence, and sample with topk and multinomial.

- generate_static: the shortest such code. Every row reads the prompt, and the tokens are only collected.
- generate_like_nanochat: as the engine of Karpathy's nanochat does it. The prompt is read once, in a batch of one; its
  cache is copied for all rows, and a Python loop over the rows follows each step: it looks for end tokens and tool
  calls, and collects the tokens.

Shapes: B sequences of equal length, T new tokens, K key/value heads, D head size, V vocabulary.
"""

from collections import deque
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from nanochat.gpt import GPT
from nanochat.request import Request
from nanochat.tokenizer import Tokenizer
from nanochat.tools import ToolUse


class PlainCache:
    """The KV cache of sequences of equal length. Prompts must not be longer than the shortest window."""

    def __init__(self, model: GPT, B: int, length: int):
        config = model.config
        shape = (config.n_layer, B, config.n_kv_head, length, config.head_dim)
        self.model = model
        self.keys = torch.zeros(shape, device=model.device, dtype=model.dtype)
        self.values = torch.zeros(shape, device=model.device, dtype=model.dtype)
        self.previous_B1 = torch.zeros(B, 1, device=model.device, dtype=torch.long)  # tokens
        self.start = 0  # tokens read so far

    def read(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Reads the next tokens of every sequence; returns the logits (B, V) after the last one."""
        self.stop = self.start + ids_BT.size(1)
        self.positions_BT = torch.arange(self.start, self.stop, device=ids_BT.device)[None]
        logits_BV = self.model.logits(self.model.hidden(ids_BT, self)[:, -1])
        self.start = self.stop
        self.previous_B1 = ids_BT[:, -1:]
        return logits_BV

    def copy_for(self, num_rows: int, length: int) -> "PlainCache":
        """A cache of that many sequences with room for `length` tokens; each continues this cache's only sequence."""
        copy = PlainCache(self.model, num_rows, length)
        copy.keys[..., : self.start, :] = self.keys[..., : self.start, :]
        copy.values[..., : self.start, :] = self.values[..., : self.start, :]
        copy.previous_B1 = self.previous_B1.repeat(num_rows, 1)
        copy.start = self.start
        return copy

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


@torch.inference_mode()
def generate_static(model: GPT, request: Request, num_rows: int) -> list[list[int]]:
    """Samples completions of one prompt, each of max_tokens tokens. Returns the tokens of each step, on the host."""
    cache = PlainCache(model, num_rows, len(request.prompt) + request.max_tokens)
    ids_BT = torch.tensor([request.prompt] * num_rows, device=model.device)
    steps = []
    for _ in range(request.max_tokens):
        ids_BT = sample_next(cache.read(ids_BT), request.temperature, request.top_k)
        steps.append(ids_BT.flatten().tolist())
    return steps


@dataclass
class Row:
    """The state of one completion of generate_like_nanochat."""

    tools: ToolUse
    tokens: list[int] = field(default_factory=list)  # with the end token
    forced: deque[int] = field(default_factory=deque)  # tool output to insert next
    has_ended: bool = False

    def accept(self, sampled: int, stop_tokens: set[int]) -> int:
        """Returns the next token of the row: the sampled one, or in its place the next forced one."""
        token = self.forced.popleft() if self.forced else sampled
        if not self.has_ended:
            self.tokens.append(token)
            self.has_ended = token in stop_tokens
            self.forced.extend(self.tools.observe(token))
        return token


@torch.inference_mode()
def generate_like_nanochat(model: GPT, tokenizer: Tokenizer, request: Request, num_rows: int) -> list[list[int]]:
    """
    Samples completions of one prompt; returns the tokens of each, with the end token. Every row is computed until the
    last one has ended.
    """
    stop_tokens = {tokenizer.special("<|assistant_end|>"), tokenizer.bos}
    rows = [Row(ToolUse(tokenizer)) for _ in range(num_rows)]
    prompt_cache = PlainCache(model, 1, len(request.prompt))
    logits_1V = prompt_cache.read(torch.tensor([request.prompt], device=model.device))
    cache = prompt_cache.copy_for(num_rows, len(request.prompt) + request.max_tokens)
    logits_BV = logits_1V.expand(num_rows, -1)
    for i in range(request.max_tokens):
        sampled = sample_next(logits_BV, request.temperature, request.top_k).flatten().tolist()
        tokens = [row.accept(token, stop_tokens) for row, token in zip(rows, sampled, strict=True)]
        if all(row.has_ended for row in rows) or i == request.max_tokens - 1:
            break
        logits_BV = cache.read(torch.tensor(tokens, device=model.device)[:, None])
    return [row.tokens for row in rows]
