"""
Generation with a KV cache: one engine for the terminal, the server, the evaluations and reinforcement learning.

Requests join and leave between any two steps (continuous batching). Prompts are read in chunks, several at a time, and
the result is copied into a slot of the decoder (decoder.py), where every step adds a token to all active slots. Each
request has its own sampling parameters, random numbers and tools.

What several prompts begin with is read once: a bounded cache keeps the keys and values of whole chunks, by their tokens
and all tokens before them. A chunk is whole if it has the full length or ends with a turn of the assistant. So the next
turn of a conversation reads only the new message, if `read_ahead` has read the last completion in the meantime. (It has
to be read: its keys and values come from decode steps, which compute in other shapes.)

In float32 on a CPU, a completion does not depend on the other requests. In 16 bits or on a GPU it may: kernels of
matrix products differ with the size of the batch, and so do the last bits of logits, which decide between close tokens.
The cache is exact in float32 on a CPU: where chunks end follows from the tokens, and a whole chunk is read in a forward
pass of its own, so all shapes of its computation follow from the tokens, and with them every bit of its result. (The
rows of a matrix product alone do not ensure that: MKL's change with the number of rows below 12, oneDNN's for narrow
matrices at any number.) Elsewhere whole chunks of several prompts are read together, as that is faster.

    engine = Engine(model, tokenizer)
    completions = engine.generate([Request(prompt), …])        # all at once
    number = engine.add(Request(prompt))                       # or step by step, as a server does
    for number, token, completion in engine.step(): …

Shapes: B sequences, T new tokens, S tokens in the cache, K key/value heads, D head size.
"""

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
from torch.nn.utils.rnn import pad_sequence

from nanochat.attention import attend, attend_cached, band_mask
from nanochat.common import UserError
from nanochat.decoder import Decoder, Prefix, StepRow, upload
from nanochat.gpt import GPT, GPTConfig
from nanochat.kv_cache import layers_by_window
from nanochat.sampling import BatchSampling, SamplingParams
from nanochat.speculation import Drafter
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
# From this many tokens on, compiling the decode step saves more time than it takes the first time: 40 s against about
# 0.2 ms a token, at depth 4 on two cores.
MIN_TOKENS_TO_COMPILE = 200_000
# Tokens of a prompt per forward pass, during which requests in slots wait. On a GPU a pass of 512 takes hardly longer
# than one of 128. On a CPU, 128 at a time are 7 % slower than 512 (depth 4), but of a prompt whose beginning is cached
# at most 127 known tokens are read again.
CPU_CHUNK, GPU_CHUNK = 128, 512
MIN_TEMPERATURE = 1e-30  # logits divided by a smaller temperature would overflow float32


@dataclass(frozen=True)
class Request:
    """A prompt with its sampling parameters."""

    prompt: list[int]
    max_tokens: int = 256  # new tokens, forced ones included
    temperature: float = 1.0  # 0 = greedy
    top_k: int = 0  # sample among the k most likely tokens; 0 = all
    top_p: float = 1.0  # sample among the fewest tokens whose probabilities add up to this; 1 = all
    seed: int = 0  # of the random numbers; in float32 on a CPU the completion depends on nothing else in the batch
    logprobs: bool = False  # return the log-probabilities of the tokens

    def validate(self, config: GPTConfig) -> None:
        """UserError for parameters out of range, or a prompt that does not fit the model."""
        context = config.sequence_len
        if not self.prompt:
            raise UserError(f"the prompt is empty: it needs 1 to {context} tokens")
        if len(self.prompt) > context:
            raise UserError(f"the prompt has {len(self.prompt)} tokens: the model's context has {context}")
        if not 0 <= min(self.prompt) <= max(self.prompt) < config.vocab_size:
            raise UserError(
                f"the prompt has tokens {min(self.prompt)} to {max(self.prompt)}: the model's vocabulary is 0 to "
                f"{config.vocab_size - 1}; encode it with the tokenizer that the model was trained with"
            )
        if self.max_tokens < 1:
            raise UserError(f"max_tokens {self.max_tokens}: must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature {self.temperature}: must be a number of at least 0 (0 = greedy)")
        if self.top_k < 0:
            raise UserError(f"top_k {self.top_k}: must be at least 0 (0 = all tokens)")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p}: must be above 0 and at most 1 (1 = all tokens)")
        if not -(2**63) <= self.seed < 2**64:
            raise UserError(f"seed {self.seed}: must be an integer of 64 bits")


@dataclass
class Completion:
    """The tokens generated after a prompt, without the end token."""

    tokens: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)  # per token; False: forced by a tool
    # One per token in nats, and one for the end token if it was sampled; empty unless the request asks for them.
    # Sampled tokens: under the distribution that they were sampled from; greedy ones: under the plain softmax; forced
    # ones: 0.
    logprobs: list[float] = field(default_factory=list)
    finish: str = ""  # "stop": an end token; "length": max_tokens; "context": the model's context is full
    end_token: int = -1  # the end token that was sampled, if any


class Event(NamedTuple):
    """Something that happened to a request in a step."""

    number: int  # of the request
    token: int | None  # its next token; None: it has ended
    completion: Completion  # so far


# ---- prefill ----


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

    def next_chunk(self, size: int, end_of_turn: int) -> ChunkKey:
        start = self.last_chunk.stop
        tokens = self.tokens[start : start + size]
        if end_of_turn in tokens:
            tokens = tokens[: tokens.index(end_of_turn) + 1]
        return self.last_chunk, tokens

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


# ---- requests ----


class ActiveRequest:
    """A request with its state, from the queue until its completion has ended."""

    def __init__(self, number: int, request: Request, tools: ToolUse, config: GPTConfig):
        self.number, self.request, self.tools = number, request, tools
        room = config.sequence_len + 1 - len(request.prompt)  # + 1: the last token is never read
        self.limit = min(request.max_tokens, room)  # new tokens
        self.limit_reason = "context" if room < request.max_tokens else "length"
        self.params = sampling_params(request, config.vocab_size)
        self.last_two = [0, *request.prompt][-2:]  # tokens so far
        self.forced: deque[int] = deque()  # tool output to insert next
        self.completion = Completion()
        self.drafter: Drafter | None = None  # for speculative decoding

    @property
    def position(self) -> int:
        """The position of the token that the next step reads."""
        return len(self.request.prompt) + len(self.completion.tokens) - 1

    @cached_property
    def uniforms(self) -> list[float]:
        """A random number for each token of the completion."""
        return random_uniforms(self.request.seed, self.limit).tolist()

    def row(self, draft: list[int], num_drafted: int) -> StepRow:
        """What the next step reads: the last token and the draft, padded to num_drafted tokens."""
        start = len(self.completion.tokens)
        uniforms = self.uniforms[start : start + 1 + num_drafted]
        previous, token = self.last_two
        if num_drafted:
            draft = draft + [0] * (num_drafted - len(draft))
            uniforms = uniforms + [0.0] * (1 + num_drafted - len(uniforms))
        return StepRow(self.position, previous, [token, *draft], self.params, uniforms)

    def accept(self, sampled: int, logprob: float, stop_tokens: set[int]) -> int | None:
        """
        Adds the sampled token, or instead of it the next forced one, and returns it; None for an end token. Sets
        `completion.finish` if the completion ends with it.
        """
        completion = self.completion
        is_sampled = not self.forced
        token = sampled if is_sampled else self.forced.popleft()
        if self.request.logprobs:
            completion.logprobs.append(logprob if is_sampled else 0.0)
        if is_sampled and token in stop_tokens:
            completion.finish, completion.end_token = "stop", token
            return None
        completion.tokens.append(token)
        completion.sampled.append(is_sampled)
        self.last_two = [self.last_two[1], token]
        if self.drafter:
            self.drafter.add(token)
        if is_sampled:
            self.forced.extend(self.tools.observe(token))
        if len(completion.tokens) >= self.limit:
            completion.finish = self.limit_reason
        return token

    def draft(self, count: int) -> list[int]:
        """Up to `count` tokens that probably come next; forced ones are certain."""
        if not self.drafter:
            return []
        count = min(count, self.limit - len(self.completion.tokens) - 1)
        return list(islice(self.forced, count)) or self.drafter.draft(count)


def pays_to_compile(num_completions: int, max_tokens: int) -> bool:
    """
    Whether an engine should compile for so many completions. It follows from the plan of a run, not from the time that
    passes: a run that is resumed must compute in the same way.
    """
    return num_completions * max_tokens // 2 >= MIN_TOKENS_TO_COMPILE  # a completion ends early, on average half-way


def sampling_params(request: Request, vocab_size: int) -> SamplingParams:
    """
    Converts the parameters for the decoder: rounds them to float32, and removes a top_k that excludes nothing. Without
    rounding, host and device could disagree on which rows are limited. Example: a top_p of 1 - 1e-12 is a limit on the
    host, but in float32 on the device it is 1, no limit, and no branch of `sample` would sample that row.
    """
    temperature, top_p = torch.tensor([request.temperature, request.top_p], dtype=torch.float32).tolist()
    if request.temperature > 0:
        temperature = max(temperature, MIN_TEMPERATURE)
    top_k = request.top_k if request.top_k < vocab_size else 0
    return SamplingParams(temperature, top_k, top_p, request.logprobs)


def random_uniforms(seed: int, count: int) -> torch.Tensor:
    """
    Random numbers in [0, 1), multiples of 2^-24, from a seed of 64 bits. Negative seeds are taken modulo 2^64.

    torch's generator on the CPU uses only the lower 32 bits of a seed, so larger seeds use Python's generator.
    """
    seed %= 2**64
    if seed < 2**32:
        return torch.rand(count, generator=torch.Generator().manual_seed(seed))
    generator = random.Random(seed)
    return torch.tensor([generator.getrandbits(24) for _ in range(count)]) / 2**24


# ---- the engine ----


class Engine:
    """Generates completions for up to `max_slots` requests at a time, one per slot; further ones wait in a queue."""

    max_prefill_tokens = 4096  # of all prompts in one step, padding included; limits the memory of a forward pass
    max_cached_bytes = 256 * 2**20  # of prefixes that no request needs at the moment; heuristic, not tuned
    length_multiple = 128  # the length of slots grows in multiples of this; heuristic, not tuned

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        max_slots: int = 32,
        *,
        precisions: Sequence[str] = (),
        compile: bool = False,
        speculate: int = 0,
        share_prompts: bool = False,
    ):
        """
        precisions: what the decode step on a CPU may use if it is faster than the model's dtype, though it changes the
        logits a little: "bfloat16", or "int8" for weights of 8 bits with one scale per output. Prompts are always read
        in the model's own dtype.
        compile: compile the decode step at its first use, where torch can. On a CPU this takes 20 to 40 s at depth 4;
        later 1 s, as the code is kept in the base folder (aot.py). On CUDA the step has a fifth of the kernels.
        speculate: number of tokens to draft per step where text repeats (speculation.py); 0 = off. With 4, greedy
        continuations of repetitive text are 1.55 times as fast on a CPU at 1 row and 1.2 times at 8, and chats 1.1 to
        1.2 times; sampled text that hardly repeats takes up to 1.3 times as long at 8 rows.
        share_prompts: requests with the same prompt read one copy of its keys (shared_prompts.py).
        """
        if max_slots < 1:
            raise UserError(f"an engine needs at least 1 slot, not {max_slots}")
        if speculate < 0:
            raise UserError(f"speculate {speculate}: must be at least 0 (0 = off)")
        self.model = model
        self.tokenizer = tokenizer
        self.max_slots = max_slots
        # BOS too: a base model has no end token, but predicts the start of the next document.
        self.end_of_turn = tokenizer.special("<|assistant_end|>")
        self.stop_tokens = {self.end_of_turn, tokenizer.bos}
        with torch.inference_mode():
            self.decoder = Decoder(
                model,
                max_slots,
                precisions=precisions,
                compile=compile,
                max_drafted=speculate,
                share_prompts=share_prompts,
            )
        self.speculate = speculate
        self.prefill_chunk = CPU_CHUNK if model.device.type == "cpu" else GPU_CHUNK
        # Only then does the state of a whole chunk not depend on what is read with it (see above).
        self.read_alone = model.device.type == "cpu" and model.dtype == torch.float32
        self.waiting: deque[tuple[ActiveRequest, Prompt]] = deque()
        self.active: list[ActiveRequest] = []  # in slots 0, 1, …
        # Requests with the same prompt share an object, until none of them is waiting.
        self.prompts: WeakValueDictionary[tuple[int, ...], Prompt] = WeakValueDictionary()
        self.cached: dict[ChunkKey, Chunk] = {}  # whole chunks; those used last are at the end
        self.num_cached_prefix_tokens = 0
        self.num_requests = 0  # so far

    @torch.inference_mode()
    def refresh_weights(self) -> None:
        """Must be called after the model's weights have changed, when the engine has no requests."""
        assert not self.is_busy, "the KV cache of requests in progress comes from the old weights"
        self.decoder.refresh_weights()
        self.cached.clear()
        self.num_cached_prefix_tokens = 0

    def warm_up(self) -> None:
        """Generates a few tokens, so that later requests need not wait for a first use: compiling, captured graphs."""
        prompts = [[0]]
        if self.speculate:
            prompts.append([0] * 4)  # its repetition gives a draft
        for prompt in prompts:
            request = Request(prompt, max_tokens=2)
            self.generate([request])
            self.generate([request] * min(2, self.max_slots))

    @property
    def is_busy(self) -> bool:
        return bool(self.waiting or self.active)

    @property
    def prefix_cache_bytes(self) -> int:
        config = self.model.config
        return self.num_cached_prefix_tokens * 2 * config.n_layer * config.kv_width * self.model.dtype.itemsize

    # ---- all at once ----

    def generate(
        self, requests: Sequence[Request], report: Callable[[int], object] = lambda num_done: None
    ) -> list[Completion]:
        """
        Returns the completions in the order of the requests. UserError as in `stream`. report: called with the number
        of completions so far.
        """
        completions: dict[int, Completion] = {}
        for index, token, completion in self.stream(requests):
            if token is None:
                completions[index] = completion
                report(len(completions))
        return [completions[index] for index in range(len(requests))]

    def stream(self, requests: Sequence[Request]) -> Iterator[Event]:
        """
        Yields an event per token and one with the token None when a completion has ended. The events' numbers are the
        indices of the requests. UserError before anything is generated if a request is not valid.
        """
        assert not self.is_busy, "stream and generate need an engine without other requests"
        for i, request in enumerate(requests):
            try:
                request.validate(self.model.config)
            except UserError as error:
                raise UserError(f"request {i}: {error}") from None
        indices = {self.add(request): i for i, request in enumerate(requests)}
        try:
            while self.is_busy:
                for number, token, completion in self.step():
                    yield Event(indices[number], token, completion)
        finally:
            for number in indices:
                self.cancel(number)

    # ---- step by step ----

    def add(self, request: Request) -> int:
        """Queues a request; returns its number, which its events carry. UserError if the request is not valid."""
        request.validate(self.model.config)
        entry = ActiveRequest(self.num_requests, request, ToolUse(self.tokenizer), self.model.config)
        if self.speculate:
            entry.drafter = Drafter(request.prompt)
        self.num_requests += 1
        tokens = tuple(request.prompt[:-1])
        self.waiting.append((entry, self.prompts.setdefault(tokens, Prompt(tokens))))
        return entry.number

    @torch.inference_mode()
    def cancel(self, number: int) -> None:
        """Removes a request without further events. Does nothing if it has already ended."""
        for pair in [pair for pair in self.waiting if pair[0].number == number]:
            self.waiting.remove(pair)
        for slot in [slot for slot, entry in enumerate(self.active) if entry.number == number]:
            self._free_slot(slot)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """
        Reads the next chunk of each prompt being read, then adds a token to every request that is in a slot; with
        drafts, those of its draft that are right, and one after them.
        """
        self._read_prompts()
        self._fill_slots()
        if not self.active:
            return []
        drafts = [entry.draft(self.speculate) for entry in self.active]
        num_drafted = self.speculate if any(drafts) else 0  # few shapes: shorter drafts are padded
        rows = [entry.row(draft, num_drafted) for entry, draft in zip(self.active, drafts, strict=True)]
        sampling = BatchSampling.of([entry.params for entry in self.active], self.model.config.vocab_size)
        tokens, logprobs = self.decoder.step(rows, sampling)

        events: list[Event] = []
        for slot, (entry, draft) in enumerate(zip(self.active, drafts, strict=True)):
            for i, sampled in enumerate(tokens[slot][: len(draft) + 1]):
                token = entry.accept(sampled, logprobs[slot][i] if logprobs else 0.0, self.stop_tokens)
                if token is not None:
                    events.append(Event(entry.number, token, entry.completion))
                if entry.completion.finish:
                    events.append(Event(entry.number, None, entry.completion))
                if entry.completion.finish or draft[i : i + 1] != [token]:
                    break
        for slot in reversed(range(len(self.active))):
            if self.active[slot].completion.finish:
                self._free_slot(slot)
        return events

    def _read_prompts(self) -> None:
        """
        Reads the next chunk of the prompts of the next waiting requests, at most one request per free slot. A chunk
        that several prompts share is read once.
        """
        num_free = self.max_slots - len(self.active)
        readers: dict[ChunkKey, list[Prompt]] = {}
        for prompt in dict.fromkeys(prompt for _, prompt in islice(self.waiting, num_free)):  # each one once
            self._skip_cached(prompt)
            if not prompt.is_read:
                readers.setdefault(self._next_chunk(prompt), []).append(prompt)
        for chunks in self._passes(readers):
            for key, chunk in zip(chunks, Prefill(self.model).read(chunks), strict=True):
                for prompt in readers[key]:
                    prompt.last_chunk = chunk
                if self._is_whole(chunk.tokens):
                    self._cache(chunk)

    @torch.inference_mode()
    def read_ahead(self, prompt: list[int], completion: Completion) -> None:
        """Reads a completion into the cache, for the next turn of its conversation."""
        conversation = Prompt((*prompt, *completion.tokens, self.end_of_turn))
        if len(conversation.tokens) > self.model.config.sequence_len:
            return
        self._skip_cached(conversation)
        while not conversation.is_read:
            (chunk,) = Prefill(self.model).read([self._next_chunk(conversation)])
            conversation.last_chunk = chunk
            self._cache(chunk)

    def _next_chunk(self, prompt: Prompt) -> ChunkKey:
        return prompt.next_chunk(self.prefill_chunk, self.end_of_turn)

    def _is_whole(self, tokens: tuple[int, ...]) -> bool:
        """Whether every prompt that continues these tokens has them as a chunk, so that caching it is of use."""
        return len(tokens) == self.prefill_chunk or tokens[-1] == self.end_of_turn

    def _skip_cached(self, prompt: Prompt) -> None:
        """Takes the next chunks of a prompt from the cache, as far as they are there."""
        while not prompt.is_read and (chunk := self.cached.get(self._next_chunk(prompt))):
            prompt.last_chunk = chunk
            self._cache(chunk)

    def _passes(self, chunks: Iterable[ChunkKey]) -> Iterable[list[ChunkKey]]:
        """Divides the chunks into those that are read together; leaves out those for which there is no room."""
        passes: dict[tuple[int, ChunkKey | None], list[ChunkKey]] = {}
        longest = 0
        for i, key in enumerate(chunks):
            previous, tokens = key
            longest = max(longest, len(tokens))
            if i and (i + 1) * longest > self.max_prefill_tokens:
                break
            is_alone = self.read_alone and self._is_whole(tokens)
            passes.setdefault((previous.stop, key if is_alone else None), []).append(key)
        return passes.values()

    def _cache(self, chunk: Chunk) -> None:
        """
        Marks a chunk and those before it as used last, in this order: a chunk leaves the cache before those that it
        needs. Removes those whose last use is longest ago.
        """
        while chunk.previous:
            key = (chunk.previous, chunk.tokens)
            if not self.cached.pop(key, None):
                self.num_cached_prefix_tokens += len(chunk.tokens)
            self.cached[key] = chunk
            chunk = chunk.previous
        while self.prefix_cache_bytes > self.max_cached_bytes:
            oldest = next(iter(self.cached))
            self.num_cached_prefix_tokens -= len(self.cached.pop(oldest).tokens)

    def _fill_slots(self) -> None:
        """
        Moves requests whose prompts have been read into free slots, first come, first served; those that share a
        prompt, such as the samples of reinforcement learning, together.
        """
        while self.waiting and len(self.active) < self.max_slots and self.waiting[0][1].is_read:
            # They stay in the queue until their slots are filled, so that cancel() still finds them.
            prompt = self.waiting[0][1]
            entries = []
            for entry, other in islice(self.waiting, self.max_slots - len(self.active)):
                if other is not prompt:
                    break
                entries.append(entry)
            self._reserve(prompt, entries)
            self.decoder.fill(len(self.active), len(entries), prompt.prefix())
            for _ in entries:
                self.active.append(self.waiting.popleft()[0])

    def _reserve(self, prompt: Prompt, entries: list[ActiveRequest]) -> None:
        """Grows the decoder: enough slots for the waiting requests, each long enough for these."""
        num_read = max(entry.limit for entry in entries)
        if not self.decoder.prompts:  # else prompts are not in the slots
            num_read += len(prompt.tokens)
        length = -(-num_read // self.length_multiple) * self.length_multiple  # rounded up
        num_slots = min(self.max_slots, len(self.active) + len(self.waiting))
        self.decoder.reserve(num_slots, min(length, self.model.config.sequence_len))

    def _free_slot(self, slot: int) -> None:
        """Removes a request from its slot and moves the last one there, as active slots must be the first ones."""
        self.decoder.free(slot, len(self.active))
        self.active[slot] = self.active[-1]
        self.active.pop()


def sample_prompts(engine: Engine, max_tokens: int = 32) -> list[dict[str, str]]:
    """Samples a few prompts: a quick look at what a base model has learned. Returns what sample_greedily does."""
    tokenizer = engine.tokenizer
    prompts = {text: [tokenizer.bos, *tokenizer.encode(text)] for text in SAMPLE_PROMPTS}
    return sample_greedily(engine, prompts, max_tokens)


def sample_greedily(engine: Engine, prompts: Mapping[str, list[int]], max_tokens: int) -> list[dict[str, str]]:
    """
    Prints greedy completions of the prompts that fit the context. Returns them for the metrics file, as
    {"prompt": text, "completion": text}. prompts: text → token ids.
    """
    fitting = {text: ids for text, ids in prompts.items() if len(ids) <= engine.model.config.sequence_len}
    completions = engine.generate([Request(ids, max_tokens, temperature=0.0) for ids in fitting.values()])
    samples = []
    for text, completion in zip(fitting, completions, strict=True):
        samples.append({"prompt": text, "completion": engine.tokenizer.decode(completion.tokens)})
        print(f"  {text!r} → {samples[-1]['completion']!r}", flush=True)
    return samples
