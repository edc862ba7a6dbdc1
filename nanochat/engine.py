"""
Generation with a KV cache: one engine for the terminal, the server, the evaluations and reinforcement learning.

Requests join and leave between any two steps (continuous batching). Prompts are read in chunks, several at a time, and
a prompt that several requests share is read once. The result is copied into a slot of the decoder (decoder.py), where
every step adds a token to all active slots. Each request has its own sampling parameters, random numbers and tools. In
float32 on a CPU, a completion does not depend on the other requests. In 16 bits or on a GPU it may: kernels of matrix
products differ with the size of the batch, and so do the last bits of logits, which decide between close tokens.

    engine = Engine(model, tokenizer)
    completions = engine.generate([Request(prompt), …])        # all at once
    number = engine.add(Request(prompt))                       # or step by step, as a server does
    for number, token, completion in engine.step(): …

Shapes: B sequences, T new tokens, S tokens in the cache, K key/value heads, D head size.
"""

import random
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, takewhile
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from nanochat.attention import attend, attend_cached, band_mask
from nanochat.common import UserError
from nanochat.decoder import Decoder, Prefix, SlotStart, layers_by_window, upload
from nanochat.gpt import GPT, GPTConfig
from nanochat.sampling import BatchSampling, SamplingParams
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
# From this many tokens on, compiling the decode step saves more time than it takes: 20 to 40 s against about 0.2 ms a
# token, at depth 4 on two cores.
MIN_TOKENS_TO_COMPILE = 200_000
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


class Prefill:
    """
    Reads prompts of different lengths together, chunk by chunk. The object is the KV cache of the model's forward
    passes (gpt.Cache).

    All prompts start at position 0 and advance together. Prompts that end within a chunk are padded on the right, where
    causal attention hides the padding from their tokens. After the chunk these prompts are complete and are removed.
    """

    def __init__(self, prompts: Sequence[tuple[int, ...]], model: GPT):
        self.prompts = list(prompts)
        self.model = model
        self.start = 0  # tokens read so far
        self.keys: dict[int, torch.Tensor] = {}  # by layer, (B, S, K, D)
        self.values: dict[int, torch.Tensor] = {}

    def read(self, num_tokens: int) -> list[Prefix]:
        """Reads the next tokens of every prompt; returns the states of the prompts that are complete."""
        stop = min(self.start + num_tokens, max(map(len, self.prompts)))
        chunks = [torch.tensor(prompt[self.start : stop]) for prompt in self.prompts]
        self.positions_BT = torch.arange(self.start, stop, device=self.model.device)[None]
        previous = [prompt[max(self.start - 1, 0)] for prompt in self.prompts]
        self.previous_B1 = upload(torch.tensor(previous)[:, None], self.model.device)
        self.masks: dict[int, torch.Tensor] = {}  # by window
        self.model.hidden(upload(pad_sequence(chunks, batch_first=True), self.model.device), self)
        self.start = stop
        prefixes = [self._prefix(b) for b, prompt in enumerate(self.prompts) if len(prompt) <= stop]
        self._keep([b for b, prompt in enumerate(self.prompts) if len(prompt) > stop])
        return prefixes

    def drop(self, prompt: tuple[int, ...]) -> None:
        """Stops reading a prompt. Does nothing if it is not among these."""
        if prompt in self.prompts:
            self._keep([b for b, other in enumerate(self.prompts) if other != prompt])

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        """The attention of one layer, called by the model: appends to the cache, then reads it."""
        if self.start == 0:
            self.keys[layer], self.values[layer] = k, v
            return attend(q, k, v, window)
        self.keys[layer] = torch.cat([self.keys[layer], k], dim=1)
        self.values[layer] = torch.cat([self.values[layer], v], dim=1)
        if window not in self.masks:
            stop = self.start + q.size(1)
            first_key = stop - self.keys[layer].size(1)
            self.masks[window] = band_mask(self.positions_BT, first_key, stop, window).unsqueeze(1)
        return attend_cached(q, self.keys[layer], self.values[layer], self.masks[window])

    def _keep(self, rows: list[int]) -> None:
        """Keeps these prompts only, and of each layer's keys and values those that its window still reaches."""
        self.prompts = [self.prompts[b] for b in rows]
        if not rows:
            self.keys, self.values = {}, {}
            return
        rows_B = upload(torch.tensor(rows), self.model.device)
        for layer in self.keys:
            window = self.model.config.windows[layer]
            self.keys[layer] = self.keys[layer][:, -window:].index_select(0, rows_B)
            self.values[layer] = self.values[layer][:, -window:].index_select(0, rows_B)

    def _prefix(self, b: int) -> Prefix:
        length = len(self.prompts[b])
        caches = {}
        for window, layers in layers_by_window(self.model.config).items():
            first_key = self.start - self.keys[layers[0]].size(1)  # position of the first cached key
            visible = slice(max(0, length - window - first_key), length - first_key)
            states = [cache[layer][b, visible] for cache in (self.keys, self.values) for layer in layers]
            caches[window] = torch.stack(states).unflatten(0, (2, -1))
        return Prefix(self.prompts[b], caches)


# ---- requests ----


class ActiveRequest:
    """A request with its state, from the queue until its completion has ended."""

    def __init__(self, number: int, request: Request, tools: ToolUse, config: GPTConfig):
        self.number, self.request, self.tools = number, request, tools
        room = config.sequence_len + 1 - len(request.prompt)  # + 1: the last token is never read
        self.limit = min(request.max_tokens, room)  # new tokens
        self.limit_reason = "context" if room < request.max_tokens else "length"
        self.params = sampling_params(request, config.vocab_size)
        self.forced: deque[int] = deque()  # tool output to insert next
        self.completion = Completion()

    @property
    def prefix(self) -> tuple[int, ...]:
        """The prompt without its last token. The first decode step reads that one."""
        return tuple(self.request.prompt[:-1])

    @property
    def position(self) -> int:
        """The position of the token that the next step reads."""
        return len(self.request.prompt) + len(self.completion.tokens) - 1

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
        if is_sampled:
            self.forced.extend(self.tools.observe(token))
        if len(completion.tokens) >= self.limit:
            completion.finish = self.limit_reason
        return token


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

    prefill_chunk = 512  # tokens of a prompt per forward pass; during a pass, requests in slots wait
    max_prefill_tokens = 4096  # of all prompts in one pass, padding included; limits its memory
    length_multiple = 128  # the length of slots grows in multiples of this; heuristic, not tuned

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        max_slots: int = 32,
        *,
        precisions: Sequence[str] = (),
        compile: bool = False,
    ):
        """
        precisions: what the decode step on a CPU may use if it is faster than the model's dtype, though it changes the
        logits a little: "bfloat16", or "int8" for weights of 8 bits with one scale per output. Prompts are always read
        in the model's own dtype.
        compile: compile the decode step at its first use, on a CPU. This takes 10 to 30 s at depth 4, later 2 s, as the
        code is kept on the disk; so it pays for a server or for many completions, not for one.
        """
        if max_slots < 1:
            raise UserError(f"an engine needs at least 1 slot, not {max_slots}")
        self.model = model
        self.tokenizer = tokenizer
        self.max_slots = max_slots
        # BOS too: a base model has no end token, but predicts the start of the next document.
        self.stop_tokens = {tokenizer.special("<|assistant_end|>"), tokenizer.bos}
        with torch.inference_mode():
            self.decoder = Decoder(model, max_slots, precisions=precisions, compile=compile)
        self.waiting: deque[ActiveRequest] = deque()
        self.active: list[ActiveRequest] = []  # in slots 0, 1, …
        self.prefill = Prefill([], model)  # the prompts being read
        # Read already, kept for waiting requests. The empty one is that of prompts with a single token.
        self.prefixes: dict[tuple[int, ...], Prefix] = {(): Prefix((), {})}
        self.prefix_refcounts: Counter[tuple[int, ...]] = Counter()  # waiting requests per prefix
        self.num_requests = 0  # so far

    @torch.inference_mode()
    def refresh_weights(self) -> None:
        """Must be called after the model's weights have changed, when the engine has no requests."""
        assert not self.is_busy, "the KV cache of requests in progress comes from the old weights"
        self.decoder.refresh_weights()

    def warm_up(self) -> None:
        """Generates a few tokens, so that later requests need not wait for a first use: compiling, captured graphs."""
        request = Request([0], max_tokens=2)
        self.generate([request])
        self.generate([request] * min(2, self.max_slots))

    @property
    def is_busy(self) -> bool:
        return bool(self.waiting or self.active)

    # ---- all at once ----

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Returns the completions in the order of the requests. UserError as in `stream`."""
        completions = {index: completion for index, _, completion in self.stream(requests)}
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
        self.num_requests += 1
        self.waiting.append(entry)
        self.prefix_refcounts[entry.prefix] += 1
        return entry.number

    @torch.inference_mode()
    def cancel(self, number: int) -> None:
        """Removes a request without further events. Does nothing if it has already ended."""
        for entry in [entry for entry in self.waiting if entry.number == number]:
            self.waiting.remove(entry)
            self._release_prefix(entry.prefix)
        for slot in [slot for slot, entry in enumerate(self.active) if entry.number == number]:
            self._free_slot(slot)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Reads at most one chunk of each prompt being read, then adds a token to every request that is in a slot."""
        self._read_prompts()
        self._fill_slots()
        if not self.active:
            return []
        max_position = max(entry.position for entry in self.active)
        sampling = BatchSampling.of([entry.params for entry in self.active], self.model.config.vocab_size)
        tokens, logprobs = self.decoder.step(len(self.active), max_position, sampling)

        events: list[Event] = []
        forced: dict[int, int] = {}  # by slot
        for slot, entry in enumerate(self.active):
            logprob = logprobs[slot] if logprobs else 0.0
            token = entry.accept(tokens[slot], logprob, self.stop_tokens)
            if token is not None:
                events.append(Event(entry.number, token, entry.completion))
                if token != tokens[slot]:
                    forced[slot] = token
            if entry.completion.finish:
                events.append(Event(entry.number, None, entry.completion))
        if forced:
            self.decoder.force(forced)
        for slot in reversed(range(len(self.active))):
            if self.active[slot].completion.finish:
                self._free_slot(slot)
        return events

    def _read_prompts(self) -> None:
        """Reads one chunk of the prompts of the next waiting requests, at most one request per free slot."""
        if not self.prefill.prompts:
            self.prefill = Prefill(self._prompts_to_read(), self.model)
        if self.prefill.prompts:
            for prefix in self.prefill.read(self.prefill_chunk):
                self.prefixes[prefix.tokens] = prefix

    def _prompts_to_read(self) -> list[tuple[int, ...]]:
        num_free = self.max_slots - len(self.active)
        next_prefixes = dict.fromkeys(entry.prefix for entry in islice(self.waiting, num_free))  # each one once
        prompts = [prefix for prefix in next_prefixes if prefix not in self.prefixes]
        chunk = self.prefill_chunk
        while len(prompts) > 1 and len(prompts) * min(chunk, max(map(len, prompts))) > self.max_prefill_tokens:
            prompts.pop()
        return prompts

    def _fill_slots(self) -> None:
        """
        Moves requests whose prompts have been read into free slots, first come, first served; those that share a
        prompt, such as the samples of reinforcement learning, together.
        """
        while self.waiting and len(self.active) < self.max_slots and self.waiting[0].prefix in self.prefixes:
            # They stay in the queue until their slots are filled, so that cancel() still finds them.
            entries = self._next_with_one_prefix()
            prefix = entries[0].prefix
            self._reserve(entries)
            starts = []
            for entry in entries:
                uniforms = random_uniforms(entry.request.seed, entry.limit)
                starts.append(SlotStart(entry.request.prompt[-1], entry.params, uniforms))
            self.decoder.fill(len(self.active), self.prefixes[prefix], starts)
            for _ in entries:
                self.active.append(self.waiting.popleft())
                self._release_prefix(prefix)

    def _next_with_one_prefix(self) -> list[ActiveRequest]:
        """The next waiting requests up to one with another prefix, at most one per free slot."""
        prefix = self.waiting[0].prefix
        next_entries = islice(self.waiting, self.max_slots - len(self.active))
        return list(takewhile(lambda entry: entry.prefix == prefix, next_entries))

    def _reserve(self, entries: list[ActiveRequest]) -> None:
        """Grows the decoder: enough slots for the waiting requests, each long enough for these."""
        num_read = max(len(entry.request.prompt) + entry.limit - 1 for entry in entries)
        length = -(-num_read // self.length_multiple) * self.length_multiple  # rounded up
        num_slots = min(self.max_slots, len(self.active) + len(self.waiting))
        self.decoder.reserve(num_slots, min(length, self.model.config.sequence_len))

    def _release_prefix(self, prefix: tuple[int, ...]) -> None:
        """Drops one reference to a prefix; frees it, or stops reading it, when none is left."""
        self.prefix_refcounts[prefix] -= 1
        if self.prefix_refcounts[prefix] > 0:
            return
        del self.prefix_refcounts[prefix]
        if prefix:
            self.prefixes.pop(prefix, None)
        self.prefill.drop(prefix)

    def _free_slot(self, slot: int) -> None:
        """Removes a request from its slot and moves the last one there, as active slots must be the first ones."""
        last = self.active.pop()
        if slot < len(self.active):
            self.decoder.move(len(self.active), slot)
            self.active[slot] = last


def sample_prompts(engine: Engine, max_tokens: int = 32) -> None:
    """Prints greedy completions of a few prompts: a quick look at what a base model has learned."""
    tokenizer = engine.tokenizer
    prompts = [[tokenizer.bos, *tokenizer.encode(text)] for text in SAMPLE_PROMPTS]
    fitting = [prompt for prompt in prompts if len(prompt) <= engine.model.config.sequence_len]
    completions = engine.generate([Request(prompt, max_tokens, temperature=0.0) for prompt in fitting])
    for prompt, completion in zip(fitting, completions, strict=True):
        print(f"  {tokenizer.decode(prompt[1:])!r} → {tokenizer.decode(completion.tokens)!r}", flush=True)
