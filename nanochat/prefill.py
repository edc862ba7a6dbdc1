"""
Prefill: prompts are read in chunks, several prompts at a time, and what several prompts begin with is read once.

A bounded cache keeps the keys and values of whole chunks, by their tokens and all tokens before them. A chunk is whole
if it has the full length or ends with a turn of the assistant. So the next turn of a conversation reads only the new
message, if its last completion has been read in the meantime (Engine.read_ahead). It has to be read: its keys and
values come from decode steps, which compute in other shapes.

The cache is exact in float32 on a CPU: where chunks end follows from the tokens, and a whole chunk is read in a forward
pass of its own, so all shapes of its computation follow from the tokens, and with them every bit of its result. (The
rows of a matrix product alone do not ensure that: MKL's change with the number of rows below 12, oneDNN's for narrow
matrices at any number.) Elsewhere whole chunks of several prompts are read together, as that is faster.

Shapes: B sequences, T new tokens, S tokens in the cache, K key/value heads, D head size.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from nanochat.attention import attend, attend_cached, band_mask
from nanochat.gpt import GPT
from nanochat.kv_cache import Prefix, layers_by_window, upload

# Tokens of a prompt per forward pass, during which requests in slots wait. On a GPU a pass of 512 takes hardly longer
# than one of 128. On a CPU, 128 at a time are 7 % slower than 512 (depth 4), but of a prompt whose beginning is cached
# at most 127 known tokens are read again.
CPU_CHUNK, GPU_CHUNK = 128, 512


@dataclass(frozen=True, eq=False)
class Chunk:
    """The model's state of consecutive tokens of a prompt, and what is before them."""

    previous: "Chunk | None"  # None for EMPTY only
    tokens: tuple[int, ...]
    stop: int  # length of the prompt up to here
    caches: dict[int, torch.Tensor]  # by window: keys and values of all L layers with that window, (2, L, T, K, D)

    def last_states(self, window: int) -> torch.Tensor:
        """The keys and values of the last tokens up to here, at most `window` of them: (2, L, S, K, D)."""
        caches, chunk = [], self
        first = max(self.stop - window, 0)
        while chunk.previous and chunk.stop > first:
            caches.append(chunk.caches[window])
            chunk = chunk.previous
        return torch.cat(caches[::-1], dim=2)[:, :, -window:]


EMPTY = Chunk(None, (), 0, {})  # before the first token
ChunkKey = tuple[Chunk, tuple[int, ...]]  # what a chunk is computed from: what is before it, and its tokens


@dataclass(eq=False)
class Prompt:
    """A prompt without its last token, which the first decode step reads, and how far it has been read."""

    tokens: tuple[int, ...]
    last_chunk: Chunk = EMPTY

    @property
    def is_read(self) -> bool:
        return self.last_chunk.stop == len(self.tokens)

    def prefix(self) -> Prefix:
        """The state of a prompt that has been read."""
        chunk = self.last_chunk
        return Prefix(self.tokens, {window: chunk.last_states(window) for window in chunk.caches})


class Prefill:
    """
    A forward pass that reads chunks of B prompts, all from the same position. The object is the KV cache (gpt.Cache).

    Shorter chunks are padded on the right, where causal attention hides the padding from their tokens.
    """

    def __init__(self, model: GPT):
        self.model = model
        self.layers = layers_by_window(model.config)

    def read(self, chunks: Sequence[ChunkKey]) -> list[Chunk]:
        """Computes the chunks, in this order."""
        device = self.model.device
        self.start = start = chunks[0][0].stop
        self.past: dict[int, torch.Tensor] = {}  # by layer: earlier keys and values, (2, B, S, K, D)
        self.new: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by layer: keys and values, (B, T, K, D)
        self.masks: dict[int, torch.Tensor] = {}  # by window
        for window, layers in self.layers.items() if start else ():
            states = torch.stack([previous.last_states(window) for previous, _ in chunks], dim=2)
            self.past |= zip(layers, states.unbind(1), strict=True)
        previous_tokens = [previous.tokens[-1] if start else 0 for previous, _ in chunks]
        self.previous_B1 = upload(torch.tensor(previous_tokens)[:, None], device)
        tokens_BT = pad_sequence([torch.tensor(tokens) for _, tokens in chunks], batch_first=True)
        self.positions_BT = torch.arange(start, start + tokens_BT.size(1), device=device)[None]
        self.model.hidden(upload(tokens_BT, device), self)
        return [self._chunk(b, *chunk) for b, chunk in enumerate(chunks)]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        """The attention of one layer, called by the model."""
        self.new[layer] = (k, v)
        if self.start == 0:
            return attend(q, k, v, window)
        keys, values = (torch.cat(both, dim=1) for both in zip(self.past[layer], (k, v), strict=True))
        if window not in self.masks:
            stop = self.start + k.size(1)
            self.masks[window] = band_mask(self.positions_BT, stop - keys.size(1), stop, window).unsqueeze(1)
        return attend_cached(q, keys, values, self.masks[window])

    def _chunk(self, b: int, previous: Chunk, tokens: tuple[int, ...]) -> Chunk:
        caches = {}
        for window, layers in self.layers.items():
            states = [self.new[layer][kind][b, : len(tokens)] for kind in (0, 1) for layer in layers]
            caches[window] = torch.stack(states).unflatten(0, (2, -1))
        return Chunk(previous, tokens, previous.stop + len(tokens), caches)


class PrefixCache:
    """Reads prompts, and keeps the whole chunks that were used last."""

    max_bytes = 256 * 2**20  # of chunks, besides those that requests need at the moment; heuristic, not tuned
    max_tokens_per_step = 4096  # padding included; limits the memory of a forward pass

    def __init__(self, model: GPT, end_of_turn: int):
        self.model, self.end_of_turn = model, end_of_turn
        self.chunk_size = CPU_CHUNK if model.device.type == "cpu" else GPU_CHUNK
        # Only then does the state of a whole chunk not depend on what is read with it (see above).
        self.reads_alone = model.device.type == "cpu" and model.dtype == torch.float32
        self.chunks: dict[ChunkKey, Chunk] = {}  # those used last are at the end
        self.num_tokens = 0  # of all chunks

    @property
    def num_bytes(self) -> int:
        config = self.model.config
        return self.num_tokens * 2 * config.n_layer * config.kv_width * self.model.dtype.itemsize

    def clear(self) -> None:
        self.chunks.clear()
        self.num_tokens = 0

    def read_next(self, prompts: Iterable[Prompt]) -> None:
        """Reads the next chunk of each prompt that is not cached. A chunk that several prompts share is read once."""
        readers: dict[ChunkKey, list[Prompt]] = {}
        for prompt in dict.fromkeys(prompts):  # each one once
            self._skip_cached(prompt)
            if not prompt.is_read:
                readers.setdefault(self._next_chunk(prompt), []).append(prompt)
        for keys in self._passes(readers):
            for key, chunk in zip(keys, Prefill(self.model).read(keys), strict=True):
                for prompt in readers[key]:
                    prompt.last_chunk = chunk
                if self._is_whole(chunk.tokens):
                    self._keep(chunk)

    def _next_chunk(self, prompt: Prompt) -> ChunkKey:
        start = prompt.last_chunk.stop
        tokens = prompt.tokens[start : start + self.chunk_size]
        if self.end_of_turn in tokens:
            tokens = tokens[: tokens.index(self.end_of_turn) + 1]
        return prompt.last_chunk, tokens

    def _is_whole(self, tokens: tuple[int, ...]) -> bool:
        """Whether every prompt that continues these tokens has them as a chunk, so that keeping it is of use."""
        return len(tokens) == self.chunk_size or tokens[-1] == self.end_of_turn

    def _skip_cached(self, prompt: Prompt) -> None:
        """Takes the next chunks of a prompt from the cache, as far as they are there."""
        while not prompt.is_read and (chunk := self.chunks.get(self._next_chunk(prompt))):
            prompt.last_chunk = chunk
            self._keep(chunk)

    def _passes(self, keys: Iterable[ChunkKey]) -> Iterable[list[ChunkKey]]:
        """Divides the chunks into those that are read together; leaves out those for which there is no room."""
        passes: dict[tuple[int, ChunkKey | None], list[ChunkKey]] = {}
        longest = 0
        for i, key in enumerate(keys):
            previous, tokens = key
            longest = max(longest, len(tokens))
            if i and (i + 1) * longest > self.max_tokens_per_step:
                break
            is_alone = self.reads_alone and self._is_whole(tokens)
            passes.setdefault((previous.stop, key if is_alone else None), []).append(key)
        return passes.values()

    def _keep(self, chunk: Chunk) -> None:
        """
        Marks a chunk and those before it as used last, in this order: a chunk leaves the cache before those that it
        needs. Removes those whose last use is longest ago.
        """
        while chunk.previous:
            key = (chunk.previous, chunk.tokens)
            if not self.chunks.pop(key, None):
                self.num_tokens += len(chunk.tokens)
            self.chunks[key] = chunk
            chunk = chunk.previous
        while self.num_bytes > self.max_bytes:
            oldest = next(iter(self.chunks))
            self.num_tokens -= len(self.chunks.pop(oldest).tokens)
