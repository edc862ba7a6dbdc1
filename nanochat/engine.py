"""
Generation with a KV cache: one engine for the terminal, the server, the evaluations and reinforcement learning.

Requests (request.py) join and leave between any two steps (continuous batching). Prompts are read in chunks, several at
a time (prefill.py), and the result is copied into a slot of the decoder (decoder.py), where every step adds a token to
all active slots. Each request has its own sampling parameters, random numbers and tools.

In float32 on a CPU, a completion does not depend on the other requests. In 16 bits or on a GPU it may: kernels of
matrix products differ with the size of the batch, and so do the last bits of logits, which decide between close tokens.

    engine = Engine(model, tokenizer)
    completions = engine.generate([Request(prompt), …])        # all at once
    number = engine.add(Request(prompt))                       # or step by step, as a server does
    for number, token, completion in engine.step(): …
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from weakref import WeakValueDictionary

import torch

from nanochat.common import UserError
from nanochat.decoder import Decoder
from nanochat.gpt import GPT
from nanochat.prefill import PrefixCache, Prompt
from nanochat.request import ActiveRequest, Completion, Event, Request
from nanochat.sampling import BatchSampling
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


def pays_to_compile(num_completions: int, max_tokens: int) -> bool:
    """
    Whether an engine should compile for so many completions. It follows from the plan of a run, not from the time that
    passes: a run that is resumed must compute in the same way.
    """
    return num_completions * max_tokens // 2 >= MIN_TOKENS_TO_COMPILE  # a completion ends early, on average half-way


class Engine:
    """Generates completions for up to `max_slots` requests at a time, one per slot; further ones wait in a queue."""

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
        self.prefixes = PrefixCache(model, self.end_of_turn)
        self.waiting: deque[tuple[ActiveRequest, Prompt]] = deque()
        self.active: list[ActiveRequest] = []  # in slots 0, 1, …
        # Requests with the same prompt share an object, until none of them is waiting.
        self.prompts: WeakValueDictionary[tuple[int, ...], Prompt] = WeakValueDictionary()
        self.num_requests = 0  # so far

    @torch.inference_mode()
    def refresh_weights(self) -> None:
        """Must be called after the model's weights have changed, when the engine has no requests."""
        assert not self.is_busy, "the KV cache of requests in progress comes from the old weights"
        self.decoder.refresh_weights()
        self.prefixes.clear()

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
        tools, config = ToolUse(self.tokenizer), self.model.config
        entry = ActiveRequest(self.num_requests, request, tools, config, max_drafted=self.speculate)
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
        num_free = self.max_slots - len(self.active)
        self.prefixes.read_next(prompt for _, prompt in islice(self.waiting, num_free))
        self._fill_slots()
        if not self.active:
            return []
        drafts = self._drafts()
        read = [entry.read(draft) for entry, draft in zip(self.active, drafts, strict=True)]
        sampling = BatchSampling.of({entry.params for entry in self.active}, self.model.config.vocab_size)
        tokens, logprobs = self.decoder.step(read, sampling)

        events: list[Event] = []
        for slot, entry in enumerate(self.active):
            completion, draft = entry.completion, drafts[slot]
            for i, sampled in enumerate(tokens[slot]):
                token = entry.accept(sampled, logprobs[slot][i], self.stop_tokens)
                if token is not None:
                    events.append(Event(entry.number, token, completion))
                if completion.finish:
                    events.append(Event(entry.number, None, completion))
                    break
                if not draft or draft[i : i + 1] != [token]:
                    break
        for slot in reversed(range(len(self.active))):
            if self.active[slot].completion.finish:
                self._free_slot(slot)
        return events

    def _drafts(self) -> list[list[int]]:
        """A draft for each active request. All have the same length, so that there are few shapes of steps."""
        if not self.speculate:
            return [[]] * len(self.active)
        drafts = [entry.draft() for entry in self.active]
        if any(drafts):  # what is added may be right too
            drafts = [draft + [0] * (self.speculate - len(draft)) for draft in drafts]
        return drafts

    @torch.inference_mode()
    def read_ahead(self, prompt: list[int], completion: Completion) -> None:
        """Reads a completion into the prefix cache, for the next turn of its conversation."""
        conversation = Prompt((*prompt, *completion.tokens, self.end_of_turn))
        if len(conversation.tokens) <= self.model.config.sequence_len:
            while not conversation.is_read:
                self.prefixes.read_next([conversation])

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
