"""
Generation: one engine for the terminal, the server, the evaluations and reinforcement learning.

Requests join at any step and leave at any step. A prompt is read in chunks, several together, and once for all requests
that share it; then its state goes into a slot of the decoder, where every step adds a token to all slots in use. What a
request says does not depend on its neighbours: it has its own settings, its own random numbers and its own tools.

    engine = Engine(model, tokenizer)
    completions = engine.generate([Request(prompt), …])        # all at once
    number = engine.add(Request(prompt))                       # or step by step, as a server does
    for number, token, completion in engine.step(): …

Shapes: B texts, T new tokens, S tokens read before, K key/value heads, D head size.
"""

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from nanochat.attention import attend, attend_cached, band_mask
from nanochat.common import UserError
from nanochat.decoder import Decoder, Prefix, Sampling
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
PREFILL_CHUNK = 512  # tokens of a prompt per forward pass: others wait no longer than this takes
PREFILL_TOKENS = 4096  # of all prompts in one pass, padding included: bounds its memory
LENGTH_MULTIPLE = 128  # slots grow in steps of so many tokens; arbitrary
MIN_TEMPERATURE = 1e-30  # capped logits over a lower one would not be finite in float32


@dataclass(frozen=True)
class Request:
    """A prompt and how to go on from it."""

    prompt: list[int]
    max_tokens: int = 256  # new tokens, forced ones included
    temperature: float = 1.0  # 0 = greedy
    top_k: int = 0  # sample among the k likeliest; 0 = among all
    top_p: float = 1.0  # sample among the fewest that make up this share of the probability; 1 = among all
    seed: int = 0  # the same seed gives the same text, whatever else is in the batch
    logprobs: bool = False  # tell how likely the sampled tokens were

    def check(self, config: GPTConfig) -> None:
        """UserError for what makes no sense, or does not fit the model."""
        context = config.sequence_len
        if not self.prompt:
            raise UserError(f"the prompt is empty: it needs 1 to {context} tokens")
        if len(self.prompt) > context:
            raise UserError(f"the prompt has {len(self.prompt)} tokens: the model reads at most {context}")
        if not 0 <= min(self.prompt) <= max(self.prompt) < config.vocab_size:
            raise UserError(
                f"the prompt has tokens {min(self.prompt)} to {max(self.prompt)}: the model knows 0 to "
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
            raise UserError(f"seed {self.seed}: must be a number of 64 bits")


@dataclass
class Completion:
    """What followed a prompt. The end token is not part of it."""

    tokens: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)  # False: forced by a tool
    # Where asked for: of each token under the distribution that it was sampled from, 0 for forced ones, in nats; and
    # one more of the end token, where there is one. Greedy ones under the plain softmax.
    logprobs: list[float] = field(default_factory=list)
    finish: str = ""  # "stop" an end token, "length" max_tokens, "context" the model's context is full
    end_token: int = -1  # the one that ended it, if one did


Event = tuple[
    int, int | None, Completion
]  # number of the request; its next token, None at the end; what it said so far


class Prefill:
    """
    Reads texts of different lengths together, chunk by chunk, and is the model's cache meanwhile. All are at the same
    position; those that end within a chunk are padded on the right, which causal attention never sees, and then leave.
    """

    def __init__(self, texts: Sequence[tuple[int, ...]], model: GPT):
        self.texts, self.model = list(texts), model
        self.start = 0  # tokens read so far
        self.keys: dict[int, torch.Tensor] = {}  # by layer, (B, S, K, D)
        self.values: dict[int, torch.Tensor] = {}
        shape = (len(texts), 1, model.config.n_embd)
        self.previous_B1C = torch.zeros(shape, device=model.device, dtype=model.dtype)

    def read(self, num_tokens: int) -> list[Prefix]:
        """Feeds the next tokens of every text; returns the states of those that are complete."""
        stop = min(self.start + num_tokens, max(len(text) for text in self.texts))
        chunks = [text[self.start : stop] for text in self.texts]
        padded = [[*chunk, *[0] * (stop - self.start - len(chunk))] for chunk in chunks]
        self.positions_BT = torch.arange(self.start, stop, device=self.model.device)[None]
        self.masks: dict[int, torch.Tensor] = {}  # by window
        self.model.hidden(torch.tensor(padded, device=self.model.device), self)
        self.start = stop
        prefixes = [self._prefix(b) for b, text in enumerate(self.texts) if len(text) <= stop]
        self._keep([b for b, text in enumerate(self.texts) if len(text) > stop])
        return prefixes

    def drop(self, text: tuple[int, ...]) -> None:
        """Stops reading a text, if it is among these."""
        self._keep([b for b, other in enumerate(self.texts) if other != text])

    def _keep(self, rows: list[int]) -> None:
        self.texts = [self.texts[b] for b in rows]
        self.previous_B1C = self.previous_B1C[rows]
        for layer in self.keys:
            window = self.model.config.windows[layer]
            self.keys[layer] = self.keys[layer][rows, -window:]
            self.values[layer] = self.values[layer][rows, -window:]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
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

    def _prefix(self, b: int) -> Prefix:
        length = len(self.texts[b])

        def visible(caches: dict[int, torch.Tensor]) -> list[torch.Tensor]:
            views = []
            for layer, window in enumerate(self.model.config.windows):
                first_key = self.start - caches[layer].size(1)
                keys = slice(max(0, length - window - first_key), length - first_key)
                views.append(caches[layer][b, keys].transpose(0, 1).clone())
            return views

        return Prefix(self.texts[b], visible(self.keys), visible(self.values))


class Row:
    """A request being served."""

    def __init__(self, number: int, request: Request, tools: ToolUse, config: GPTConfig):
        self.number, self.request, self.tools = number, request, tools
        room = config.sequence_len + 1 - len(request.prompt)  # the last token is never read
        self.limit = min(request.max_tokens, room)  # new tokens
        self.full = "context" if room < request.max_tokens else "length"
        # In float32 like the device's, and limits that leave out nothing as none: host and device must agree on who is
        # greedy and who is limited, or neither would sample.
        temperature, top_p = torch.tensor([request.temperature, request.top_p], dtype=torch.float32).tolist()
        self.temperature = max(temperature, MIN_TEMPERATURE) if request.temperature else 0.0
        self.top_k = request.top_k if request.top_k < config.vocab_size else 0
        self.top_p = top_p
        self.forced: deque[int] = deque()
        self.completion = Completion()

    @property
    def prefix(self) -> tuple[int, ...]:
        """All of the prompt but its last token, which the first decode step reads."""
        return tuple(self.request.prompt[:-1])

    @property
    def position(self) -> int:
        """Of the token that the next step reads."""
        return len(self.request.prompt) + len(self.completion.tokens) - 1

    @property
    def settings(self) -> tuple[float, int, float, bool]:
        return self.temperature, self.top_k, self.top_p, self.request.logprobs

    def take(self, sampled: int, logprob: float, stop_tokens: set[int]) -> int | None:
        """Adds the sampled token, or the forced one in its stead, and returns it; None for an end token."""
        completion, is_sampled = self.completion, not self.forced
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
            completion.finish = self.full
        return token


class Engine:
    """Generates with a model, at most `num_rows` requests at a time; others wait their turn."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, num_rows: int = 32, int8: bool = False):
        """int8: decode with weights of 8 bits, a scale per output channel (W8A16). Prompts are read as without."""
        if num_rows < 1:
            raise UserError(f"an engine needs at least 1 row, not {num_rows}")
        self.model, self.tokenizer, self.num_rows = model, tokenizer, num_rows
        self.stop_tokens = {tokenizer.special("<|assistant_end|>"), tokenizer.bos}
        with torch.inference_mode():
            self.decoder = Decoder(model, num_rows, int8)
        self.waiting: deque[Row] = deque()
        self.rows: list[Row] = []  # in slots 0, 1, …
        self.prefill: Prefill | None = None  # under way
        self.prefixes: dict[tuple[int, ...], Prefix] = {(): Prefix((), [], [])}  # read, and still waited for
        self.needed: Counter[tuple[int, ...]] = Counter()  # how many wait for a prefix
        self.num_requests = 0

    @torch.inference_mode()
    def refresh_weights(self) -> None:
        """To be called after the model's weights have changed, with no request under way."""
        assert not self.is_busy, "states under way belong to the old weights"
        self.decoder.refresh_weights()

    @property
    def is_busy(self) -> bool:
        return bool(self.waiting or self.rows)

    # ---- all at once ----

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Completions in the order of the requests. UserError as from stream."""
        completions: list[Completion] = [Completion()] * len(requests)
        for index, _, completion in self.stream(requests):
            completions[index] = completion
        return completions

    def stream(self, requests: Sequence[Request]) -> Iterator[Event]:
        """
        Yields (index of the request, its next token, its completion so far) as tokens come, and once (index, None,
        completion) when it has ended. UserError before anything is generated if a request is not valid.
        """
        assert not self.is_busy, "stream and generate have the engine to themselves"
        for i, request in enumerate(requests):
            try:
                request.check(self.model.config)
            except UserError as error:
                raise UserError(f"request {i}: {error}") from None
        indices = {self.enqueue(request): i for i, request in enumerate(requests)}
        try:
            while self.is_busy:
                for number, token, completion in self.step():
                    yield indices[number], token, completion
        finally:
            for number in indices:
                self.cancel(number)

    # ---- step by step ----

    def add(self, request: Request) -> int:
        """Queues a request; returns its number, which its events carry. UserError if the request is not valid."""
        request.check(self.model.config)
        return self.enqueue(request)

    def enqueue(self, request: Request) -> int:
        """Like `add`, for a request that the caller has already validated with Request.check."""
        row = Row(self.num_requests, request, ToolUse(self.tokenizer), self.model.config)
        self.num_requests += 1
        self.waiting.append(row)
        self.needed[row.prefix] += 1
        return row.number

    @torch.inference_mode()
    def cancel(self, number: int) -> None:
        """Forgets a request, waiting or under way, without another event; nothing happens if there is none."""
        for row in [row for row in self.waiting if row.number == number]:
            self.waiting.remove(row)
            self._release(row.prefix)
        for slot in [slot for slot, row in enumerate(self.rows) if row.number == number]:
            self._free(slot)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Reads at most one chunk of prompts, then adds a token to every request that is in a slot."""
        self._read_prompts()
        self._fill_slots()
        if not self.rows:
            return []
        positions = [row.position for row in self.rows]
        sampling = Sampling.of([row.settings for row in self.rows], self.model.config.vocab_size)
        tokens, logprobs = self.decoder.step(len(self.rows), min(positions), max(positions), sampling)
        events: list[Event] = []
        forced: dict[int, int] = {}
        for slot, row in enumerate(self.rows):
            token = row.take(tokens[slot], logprobs[slot] if logprobs else 0.0, self.stop_tokens)
            if token is not None:
                events.append((row.number, token, row.completion))
                if token != tokens[slot]:
                    forced[slot] = token
            if row.completion.finish:
                events.append((row.number, None, row.completion))
        if forced:
            self.decoder.force(forced)
        for slot in reversed(range(len(self.rows))):
            if self.rows[slot].completion.finish:
                self._free(slot)
        return events

    def _read_prompts(self) -> None:
        """One chunk of the prompts of those who come next, for as many as there are free slots."""
        if not self.prefill:
            num_free = self.num_rows - len(self.rows)
            following = [row.prefix for row, _ in zip(self.waiting, range(num_free), strict=False)]
            texts = [text for text in dict.fromkeys(following) if text not in self.prefixes]
            while texts and len(texts) * min(PREFILL_CHUNK, max(map(len, texts))) > max(PREFILL_TOKENS, PREFILL_CHUNK):
                texts.pop()
            self.prefill = Prefill(texts, self.model) if texts else None
        if self.prefill:
            for prefix in self.prefill.read(PREFILL_CHUNK):
                self.prefixes[prefix.tokens] = prefix
            if not self.prefill.texts:
                self.prefill = None

    def _fill_slots(self) -> None:
        """First come, first served, as far as prompts are read and slots are free."""
        while self.waiting and len(self.rows) < self.num_rows and self.waiting[0].prefix in self.prefixes:
            row = self.waiting[0]  # until it has its slot, so that one for which memory is short can still be cancelled
            self._reserve(row)
            request, prefix = row.request, self.prefixes[row.prefix]
            uniforms = torch.rand(row.limit, generator=torch.Generator().manual_seed(request.seed))
            slot = len(self.rows)
            self.decoder.fill(slot, prefix, request.prompt[-1], row.temperature, row.top_k, row.top_p, uniforms)
            self.rows.append(self.waiting.popleft())
            self._release(row.prefix)

    def _reserve(self, row: Row) -> None:
        """Room for the row: the longest text so far decides how long the slots are, the most at once how many."""
        last_read = len(row.request.prompt) + row.limit - 1
        length = min(-(-last_read // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, self.model.config.sequence_len)
        num_slots = min(self.num_rows, len(self.rows) + len(self.waiting))
        self.decoder.reserve(num_slots, length)

    def _release(self, prefix: tuple[int, ...]) -> None:
        """One less waits for the prefix; with the last it is forgotten."""
        self.needed[prefix] -= 1
        if not self.needed[prefix]:
            del self.needed[prefix]
            if prefix:
                self.prefixes.pop(prefix, None)
            if self.prefill:
                self.prefill.drop(prefix)
                if not self.prefill.texts:
                    self.prefill = None

    def _free(self, slot: int) -> None:
        """The last row moves into the free place, so that the rows in use stay the first ones."""
        last = self.rows.pop()
        if slot < len(self.rows):
            self.decoder.move(len(self.rows), slot)
            self.rows[slot] = last


def sample_prompts(engine: Engine, max_tokens: int = 32) -> None:
    """Prints how the model goes on from a few beginnings, greedily: a quick look at what it has learned."""
    prompts = {text: [engine.tokenizer.bos, *engine.tokenizer.encode(text)] for text in SAMPLE_PROMPTS}
    context = engine.model.config.sequence_len
    requests = {text: Request(ids, max_tokens, temperature=0.0) for text, ids in prompts.items() if len(ids) <= context}
    for text, completion in zip(requests, engine.generate(list(requests.values())), strict=True):
        print(f"  {text!r} → {engine.tokenizer.decode(completion.tokens)!r}", flush=True)
