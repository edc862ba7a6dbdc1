"""
Generation: one engine for the terminal, the evaluations, and everything else that samples.

Requests wait until one of the engine's rows is free; each is prefilled there alone, in chunks, and then all rows decode
together, one token per step each. A row that finishes gives its place to the next request at once. What a row says does
not depend on its neighbours: it has its own settings, its own stream of random numbers and its own tools.

Shapes: R rows of the cache, B of them in one forward pass, T new tokens, V vocabulary, C width.
"""

import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from nanochat.attention import attend_cached, band_mask
from nanochat.common import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import Tokenizer
from nanochat.tools import ToolUse

SAMPLE_PROMPTS = (
    "The capital of France is",
    "The chemical symbol of gold is",
    "If yesterday was Friday, then tomorrow will be",
    "The opposite of hot is",
    "The planets of the solar system are:",
    "Once upon a time",
)
PREFILL_CHUNK = 512  # tokens of a prompt per forward pass: bounds the memory of its attention


@dataclass(frozen=True)
class Request:
    """A prompt and how to go on from it."""

    prompt: list[int]
    max_tokens: int = 256  # new tokens, forced ones included
    temperature: float = 1.0  # 0 = greedy
    top_k: int = 0  # sample among the k likeliest; 0 = among all
    seed: int = 0  # the same seed gives the same text, whatever else is in the batch


@dataclass
class Completion:
    """What followed a prompt. The end token is not part of it."""

    tokens: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)  # False: forced by a tool
    finish: str = ""  # "stop" an end token, "length" max_tokens, "context" the model's context is full


class KVCache:
    """
    Keys and values of R rows, each filled up to its own length; and per row the last token's un-smeared embedding,
    which the next token's smear needs. It serves one forward pass at a time: `begin` says which rows and how many new
    tokens, the model then reads positions_BT and previous_B1C and calls attend once per layer, `end` counts them in.
    """

    def __init__(self, config: GPTConfig, num_rows: int, length: int, device: torch.device, dtype: torch.dtype):
        shape = (num_rows, length, config.n_kv_head, config.head_dim)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.previous_R1C = torch.zeros((num_rows, 1, config.n_embd), device=device, dtype=dtype)
        self.lengths = [0] * num_rows
        self.device = device

    def begin(self, first: int, stop: int, num_tokens: int) -> None:
        """A forward pass over rows first … stop - 1 with num_tokens new tokens each."""
        self.rows = slice(first, stop)
        lengths = self.lengths[self.rows]
        starts_B1 = torch.tensor(lengths, device=self.device)[:, None]
        self.positions_BT = starts_B1 + torch.arange(num_tokens, device=self.device)
        self.rows_B1 = torch.arange(first, stop, device=self.device)[:, None]
        self.oldest, self.newest = min(lengths), max(lengths) + num_tokens
        self.masks: dict[int, torch.Tensor] = {}  # by window

    def end(self) -> None:
        for row in range(self.rows.start, self.rows.stop):
            self.lengths[row] += self.positions_BT.size(1)

    @property
    def previous_B1C(self) -> torch.Tensor:
        return self.previous_R1C[self.rows]

    @previous_B1C.setter
    def previous_B1C(self, value: torch.Tensor) -> None:
        self.previous_R1C[self.rows] = value

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        self.keys[layer][self.rows_B1, self.positions_BT] = k
        self.values[layer][self.rows_B1, self.positions_BT] = v
        first_key = max(0, self.oldest - window)
        if window not in self.masks:
            self.masks[window] = band_mask(self.positions_BT, first_key, self.newest, window).unsqueeze(1)
        keys = self.keys[layer][self.rows, first_key : self.newest]
        values = self.values[layer][self.rows, first_key : self.newest]
        return attend_cached(q, keys, values, self.masks[window])

    def clear(self, row: int) -> None:
        self.lengths[row] = 0
        self.previous_R1C[row] = 0  # the first token of a text has no previous one

    def copy(self, source: int, target: int) -> None:
        """Makes row `target` the same as row `source`."""
        length = self.lengths[source]
        for cache in (*self.keys, *self.values):
            cache[target, :length] = cache[source, :length]
        self.previous_R1C[target] = self.previous_R1C[source]
        self.lengths[target] = length


class Row:
    """A request being served."""

    def __init__(self, index: int, request: Request, tools: ToolUse, limit: int):
        self.index, self.request, self.tools = index, request, tools
        self.limit = min(request.max_tokens, limit)  # new tokens
        self.full = "context" if limit < request.max_tokens else "length"
        self.random = random.Random(request.seed)
        self.forced: deque[int] = deque()
        self.completion = Completion()
        self.token = -1  # the last one, which the next forward pass reads

    def take(self, sampled: int, stop_tokens: set[int]) -> bool:
        """Adds the sampled token, or the forced one in its stead; True when the row goes on."""
        is_sampled = not self.forced
        self.token = sampled if is_sampled else self.forced.popleft()
        if is_sampled and self.token in stop_tokens:
            self.completion.finish = "stop"
            return False
        self.completion.tokens.append(self.token)
        self.completion.sampled.append(is_sampled)
        if is_sampled:
            self.forced.extend(self.tools.observe(self.token))
        if len(self.completion.tokens) >= self.limit:
            self.completion.finish = self.full
        return not self.completion.finish


class Engine:
    """Generates with a model of either vintage, at most `num_rows` requests at a time."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, num_rows: int = 32):
        self.model, self.tokenizer, self.num_rows = model, tokenizer, num_rows
        self.stop_tokens = {tokenizer.special("<|assistant_end|>"), tokenizer.bos}

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Completions in the order of the requests."""
        completions: list[Completion] = [Completion()] * len(requests)
        for index, _, completion in self.stream(requests):
            completions[index] = completion
        return completions

    @torch.inference_mode()
    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, int | None, Completion]]:
        """
        Yields (index of the request, its next token, its completion so far) as tokens come, and once (index, None,
        completion) when it has ended. UserError for settings that make no sense, and for a prompt that is empty or
        longer than the context.
        """
        context = self.model.config.sequence_len
        for i, request in enumerate(requests):
            if not 1 <= len(request.prompt) <= context:
                raise UserError(f"prompt {i} has {len(request.prompt)} tokens: the model takes 1 to {context}")
            if request.max_tokens < 1 or request.temperature < 0 or request.top_k < 0:
                raise UserError(f"request {i}: max_tokens must be at least 1, temperature and top_k at least 0")
        waiting = deque(enumerate(requests))
        num_rows = min(self.num_rows, len(requests))
        longest = max((len(r.prompt) + r.max_tokens for r in requests), default=0)
        cache = KVCache(self.model.config, num_rows, min(longest, context), self.model.device, self.model.dtype)
        rows: list[Row] = []
        logits_RV = torch.empty((num_rows, self.model.config.vocab_size), device=self.model.device)
        while waiting or rows:
            while waiting and len(rows) < num_rows:
                rows.append(self._admit(*waiting.popleft(), cache, rows, logits_RV))
            for row, sampled in zip(list(rows), sample(logits_RV[: len(rows)], rows), strict=True):
                num_tokens = len(row.completion.tokens)
                if row.take(sampled, self.stop_tokens):
                    yield row.index, row.token, row.completion
                    continue
                if len(row.completion.tokens) > num_tokens:  # the last one, unless it is the end token
                    yield row.index, row.token, row.completion
                yield row.index, None, row.completion
                _remove(rows, row, cache)
            if rows:
                tokens_B1 = torch.tensor([[row.token] for row in rows], device=self.model.device)
                logits_RV[: len(rows)] = self._forward(tokens_B1, cache, 0)

    def _admit(self, index: int, request: Request, cache: KVCache, rows: list[Row], logits_RV: torch.Tensor) -> Row:
        """Prefills the first free row; a prompt that has just been prefilled for another request is copied."""
        place = len(rows)
        tools = ToolUse(self.tokenizer)
        row = Row(index, request, tools, self.model.config.sequence_len + 1 - len(request.prompt))
        for i, other in enumerate(rows):
            if other.request.prompt == request.prompt and not other.completion.tokens:
                cache.copy(i, place)
                logits_RV[place] = logits_RV[i]
                return row
        cache.clear(place)
        prompt = torch.tensor([request.prompt], device=self.model.device)
        for chunk in prompt.split(PREFILL_CHUNK, dim=1):
            logits_RV[place] = self._forward(chunk, cache, place)[0]
        return row

    def _forward(self, tokens_BT: torch.Tensor, cache: KVCache, first: int) -> torch.Tensor:
        """Feeds tokens to the rows from `first` on; logits (B, V) after the last one."""
        cache.begin(first, first + tokens_BT.size(0), tokens_BT.size(1))
        hidden_BTC = self.model.hidden(tokens_BT, cache)
        cache.end()
        return self.model.logits(hidden_BTC[:, -1])


def _remove(rows: list[Row], row: Row, cache: KVCache) -> None:
    """Takes a row out; the last one moves into its place, so that the rows in use stay the first ones."""
    place, last = rows.index(row), len(rows) - 1
    if place != last:
        cache.copy(last, place)
        rows[place] = rows[last]
    rows.pop()


def sample(logits_BV: torch.Tensor, rows: Sequence[Row]) -> list[int]:
    """The next token of each row under its own settings. One transfer to the host for all."""
    greedy_B = logits_BV.argmax(dim=-1)
    temperatures = [row.request.temperature for row in rows]
    if not any(temperatures):
        return greedy_B.tolist()
    device = logits_BV.device
    temperature_B1 = torch.tensor([t or 1.0 for t in temperatures], device=device)[:, None]
    logits_BV = logits_BV / temperature_B1
    top_ks = [min(row.request.top_k or logits_BV.size(1), logits_BV.size(1)) for row in rows]
    if min(top_ks) < logits_BV.size(1):
        best = logits_BV.topk(max(k for k in top_ks if k < logits_BV.size(1)), dim=-1).values
        threshold = best.gather(1, torch.tensor(top_ks, device=device)[:, None].clamp_max(best.size(1)) - 1)
        is_limited = torch.tensor([k < logits_BV.size(1) for k in top_ks], device=device)[:, None]
        logits_BV = logits_BV.masked_fill(is_limited & (logits_BV < threshold), -torch.inf)
    # The inverse of the cumulative distribution at one random number per row, drawn from the row's own stream.
    cumulative_BV = logits_BV.softmax(dim=-1).cumsum(dim=-1)
    # 24 bits are what float32 holds: with more, a number may round to 1, past every token.
    uniform_B1 = torch.tensor([row.random.getrandbits(24) / 2**24 for row in rows], device=device)[:, None]
    sampled_B = torch.searchsorted(cumulative_BV, uniform_B1 * cumulative_BV[:, -1:], right=True).squeeze(1)
    is_greedy = torch.tensor([t == 0 for t in temperatures], device=device)
    last = logits_BV.size(1) - 1  # what NaN logits would go past
    return torch.where(is_greedy, greedy_B, sampled_B.clamp_max(last)).tolist()


def sample_prompts(engine: Engine, max_tokens: int = 32) -> None:
    """Prints how the model goes on from a few beginnings, greedily: a quick look at what it has learned."""
    prompts = {text: [engine.tokenizer.bos, *engine.tokenizer.encode(text)] for text in SAMPLE_PROMPTS}
    context = engine.model.config.sequence_len
    requests = {text: Request(ids, max_tokens, temperature=0.0) for text, ids in prompts.items() if len(ids) <= context}
    for text, completion in zip(requests, engine.generate(list(requests.values())), strict=True):
        print(f"  {text!r} → {engine.tokenizer.decode(completion.tokens)!r}", flush=True)
