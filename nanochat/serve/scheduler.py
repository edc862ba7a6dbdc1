"""
Request scheduler: a bounded fair queue per model and one thread per engine. It knows token ids and nothing of HTTP.

    service = Service([ServedModel("sft", tokenizer, config, make_engines=[make_engine], queue_size=128)])
    service.start()                                        # needs a running event loop
    handle = service.submit(service.models["sft"], [Request(prompt)], client="10.0.0.7")
    async for _ in handle.updates():
        print(handle.generations[0].tokens)
    handle.close()                                         # always: frees the slots and queue entries

`submit` validates the requests and puts one Generation per request into the model's FairQueue. An EngineThread takes
generations from the queue, adds them to its engine and steps it (continuous batching: they join and leave between any
two steps). After each step it passes the new tokens to the event loop in a single call, which appends them to the
generations and wakes the readers of `updates`.

Threads: FairQueue is shared and has a lock, EngineThread.run is the engine's thread, and everything else runs in the
thread of the event loop.
"""

import asyncio
import math
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanochat.common import UserError
from nanochat.engine import Engine
from nanochat.gpt import GPTConfig
from nanochat.request import Completion, Request
from nanochat.tokenizer import Tokenizer

RATE_SECONDS = 60  # tokens/s are averaged over this window
JOIN_SECONDS = 10  # how long to wait at shutdown for an engine's last step; heuristic, not tuned

# How a generation can end: with an end token or stop string, at max_tokens, at the end of the model's context;
# cancelled by its client, failed with its engine, or refused because there was no room.
OUTCOMES = ("stop", "length", "context", "cancelled", "failed", "refused")


class Unavailable(Exception):
    """The model takes no requests: it is loading, shutting down, or its engines have failed for good."""

    outcome = "refused"


class QueueFull(Unavailable):
    """There is no room in the queue."""


class GenerationFailed(Exception):
    """The engine failed during this request, or the server shut down before its end."""

    outcome = "failed"


FAILURES = (Unavailable, GenerationFailed)  # the exceptions that a response can end with


@dataclass(eq=False)
class Generation:
    """One request and the tokens generated for it so far."""

    request: Request
    handle: "ResponseHandle"
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # of the tokens in nats, if the request asks for them
    # One of OUTCOMES once it has ended. The engine's thread reads it before each step, to cancel what was stopped.
    finish: str = ""
    engine_index: int = -1  # set when an engine takes it
    num_delivered: int = 0  # tokens that the engine's thread has passed on

    @property
    def client(self) -> str:
        return self.handle.client

    def stop(self, finish: str) -> None:
        """Ends it early. Its queue entry is free at once, its slot after the engine's current step."""
        if not self.finish:
            self.finish = finish
            self.handle.model.queue.remove(self)


# The result of a step for one generation: its new tokens, their log-probabilities, and the finish reason at its end.
Update = tuple[Generation, list[int], list[float], str]


class ResponseHandle:
    """The generations of one API call. The caller must close it."""

    def __init__(self, service: "Service", model: "ServedModel", requests: Sequence[Request], *, client: str):
        self.service = service
        self.model = model
        self.client = client
        self.generations = [Generation(request, self) for request in requests]
        self.error: Unavailable | GenerationFailed | None = None
        self.start_time = time.perf_counter()  # seconds
        self.first_token_time = 0.0  # 0 = there is no token yet
        self._wake = asyncio.Event()

    async def started(self) -> None:
        """Waits for the first token. Raises Unavailable or GenerationFailed if the response fails before it."""
        await self._wake.wait()
        if self.error:
            raise self.error

    async def updates(self) -> AsyncIterator[None]:
        """
        Yields whenever the generations have new tokens or ends. If the response fails, yields once more, for the tokens
        before the failure, and then raises Unavailable or GenerationFailed.
        """
        while self._wake.is_set() or not all(generation.finish for generation in self.generations):
            await self._wake.wait()
            self._wake.clear()
            error = self.error
            yield
            if error:
                raise error

    def deliver(self, generation: Generation, tokens: list[int], logprobs: list[float], finish: str) -> None:
        """Adds the result of a step and wakes the reader; does nothing if the generation was stopped."""
        if generation.finish:
            return
        generation.tokens += tokens
        generation.logprobs += logprobs
        generation.finish = finish
        if tokens and not self.first_token_time:
            self.first_token_time = time.perf_counter()
        self._wake.set()

    def fail(self, error: Unavailable | GenerationFailed) -> None:
        """Makes `started` and `updates` raise this error."""
        self.error = error
        self._wake.set()

    def close(self) -> None:
        """Cancels unfinished generations and records all outcomes; idempotent."""
        finish = self.error.outcome if self.error else "cancelled"
        for generation in self.generations:
            generation.stop(finish)
        self.service.record(self)


def fail_all(generations: Iterable[Generation], error: Unavailable | GenerationFailed) -> None:
    for generation in generations:
        generation.handle.fail(error)


class FairQueue:
    """
    Generations that wait for any engine of a model. The next one to run belongs to the client with the fewest running
    generations; on a tie, to the client that was served, or joined the queue, longest ago. So a client with many
    requests does not keep the others waiting.
    """

    def __init__(self, size: int):
        self.size = size  # generations that may wait
        self.condition = threading.Condition()
        self.waiting: list[Generation] = []  # by arrival, except that the ones of the client served last are at the end
        self.running: list[Generation] = []  # with the engines
        self.slots: dict[int, int] = {}  # by index of the engines that are ready
        self.is_closed = False

    @property
    def load(self) -> int:
        return len(self.waiting) + len(self.running)

    @property
    def capacity(self) -> int:
        """How many generations may wait or run."""
        return sum(self.slots.values()) + self.size

    def put(self, generations: list[Generation]) -> list[Generation]:
        """
        Adds the generations of one client. If there is no room, it evicts the newest generations of the client with the
        longest queue and returns them. If that would make the longest queue shorter than the one of the client that
        adds, nothing changes and QueueFull is raised.
        """
        with self.condition:
            evicted = []
            excess = self.load + len(generations) - self.capacity
            if excess > 0:
                num_waiting = Counter(generation.client for generation in self.waiting)
                client, longest = max(num_waiting.items(), key=lambda item: item[1], default=("", 0))
                if longest - excess < num_waiting[generations[0].client] + len(generations):
                    num_slots = sum(self.slots.values())
                    raise QueueFull(f"all {num_slots} slots and {self.size} queue entries are taken")
                evicted = [generation for generation in self.waiting if generation.client == client][-excess:]
            self.waiting = [generation for generation in self.waiting if generation not in evicted] + generations
            self.condition.notify_all()
        return evicted

    def take(self, engine: int, num_held: int) -> list[Generation] | None:
        """
        Returns the next generations for an engine that already holds num_held of them, up to its share of the load.
        Blocks while the engine is idle and nothing waits. Returns None once the queue is closed and the engine is idle.
        """
        with self.condition:
            while True:
                share = math.ceil(self.load / len(self.slots))
                room = min(share, self.slots[engine]) - num_held  # if negative, nothing is taken
                generations = [self._pop_next() for _ in range(min(room, len(self.waiting)))]
                if generations or num_held:
                    return generations
                if self.is_closed:
                    return None
                self.condition.wait()

    def _pop_next(self) -> Generation:
        num_running = Counter(generation.client for generation in self.running)
        generation = min(self.waiting, key=lambda each: num_running[each.client])
        self.waiting.remove(generation)
        self.waiting.sort(key=lambda each: each.client == generation.client)  # stable: the others keep their order
        self.running.append(generation)
        return generation

    def release(self, generation: Generation) -> None:
        """Notes that an engine no longer works on this generation."""
        with self.condition:
            self.running.remove(generation)

    def remove(self, generation: Generation) -> None:
        """Removes a generation from the queue; does nothing if it is not waiting."""
        with self.condition:
            if generation in self.waiting:
                self.waiting.remove(generation)

    def set_slots(self, engine: int, num_slots: int) -> None:
        """Registers an engine that is ready; with 0 slots it is removed instead."""
        with self.condition:
            self.slots[engine] = num_slots
            if not num_slots:
                del self.slots[engine]
            self.condition.notify_all()

    def clear(self) -> list[Generation]:
        """Empties the queue; returns what was waiting."""
        with self.condition:
            generations = self.waiting
            self.waiting = []
        return generations

    def close(self) -> None:
        """Ends the engines' threads as soon as they are idle."""
        with self.condition:
            self.is_closed = True
            self.condition.notify_all()


class EngineThread(threading.Thread):
    """
    Owns one engine: moves generations from the queue into it, steps it and passes the tokens on. When a step fails, all
    generations of the engine fail. A new engine replaces it if it passes a health check of one token.
    """

    def __init__(self, index: int, queue: FairQueue, make_engine: Callable[[], Engine]):
        super().__init__(name=f"engine {index}", daemon=True)
        self.index = index
        self.queue = queue
        self.make_engine = make_engine
        self.generations: dict[int, Generation] = {}  # by their number in the engine
        self.ended: list[tuple[list[int], Completion]] = []  # prompts and completions that ended in the last step
        self.state = "loading"  # or "ready", "failed"
        self.num_tokens = 0
        self.cached_prefix_tokens = 0  # of prompts whose keys and values the engine keeps
        self.prefix_cache_bytes = 0  # memory of these
        self.tokens_by_second = deque([[0, 0]], maxlen=RATE_SECONDS + 1)  # [second, number of tokens]

    def start(self) -> None:
        """Starts the thread; its results go to the running event loop."""
        self.loop = asyncio.get_running_loop()
        super().start()

    def run(self) -> None:
        while self._load_engine():
            try:
                self._serve()
                return
            except Exception as error:  # noqa: BLE001  whatever it is, report it to the clients and keep serving others
                traceback.print_exc()
                self.state = "loading"
                self.queue.set_slots(self.index, 0)
                failed = [self._drop(number) for number in list(self.generations)]
                message = f"the engine failed ({type(error).__name__}): try again, perhaps with a shorter text"
                self._call_in_loop(fail_all, failed, GenerationFailed(message))
        self.state = "failed"
        if not self.queue.slots:
            unavailable = Unavailable("all engines of this model have failed: restart the server")
            self._call_in_loop(fail_all, self.queue.clear(), unavailable)

    def _load_engine(self) -> bool:
        """Makes an engine and generates one token with it; returns whether that worked."""
        try:
            self.engine = self.make_engine()
            self.engine.warm_up()
        except Exception:  # noqa: BLE001  the server stays up to report that it is not ready
            traceback.print_exc()
            return False
        self.queue.set_slots(self.index, self.engine.max_slots)
        self.state = "ready"
        return True

    def _serve(self) -> None:
        """Steps the engine until the queue is closed."""
        while (new := self.queue.take(self.index, len(self.generations))) is not None:
            for generation in new:
                generation.engine_index = self.index
                self.generations[self.engine.add(generation.request)] = generation
            for number, generation in list(self.generations.items()):
                if generation.finish:
                    self.engine.cancel(number)
                    self._drop(number)
            if updates := self._step():
                self._call_in_loop(self._deliver, updates)
            self._read_ahead()

    def _step(self) -> list[Update]:
        updates: list[Update] = []
        self.ended.clear()
        completions = {number: completion for number, _, completion in self.engine.step()}
        for number, completion in completions.items():
            generation = self.generations[number]
            # Copies, because the engine continues to change its lists.
            stop = len(completion.tokens)
            new = slice(generation.num_delivered, stop)
            updates.append((generation, completion.tokens[new], completion.logprobs[new], completion.finish))
            generation.num_delivered = stop
            if completion.finish:
                self.ended.append((generation.request.prompt, completion))
                self._drop(number)
        return updates

    def _read_ahead(self) -> None:
        """Reads the completions that have just ended, if there is time before the next turn of their conversations."""
        if not self.engine.is_busy:
            for prompt, completion in self.ended:
                self.engine.read_ahead(prompt, completion)
        self.cached_prefix_tokens = self.engine.prefixes.num_tokens
        self.prefix_cache_bytes = self.engine.prefixes.num_bytes

    def _drop(self, number: int) -> Generation:
        generation = self.generations.pop(number)
        self.queue.release(generation)
        return generation

    def _call_in_loop(self, callback: Callable[..., object], *arguments: object) -> None:
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(callback, *arguments)

    def _deliver(self, updates: list[Update]) -> None:
        num_tokens = sum(len(tokens) for _, tokens, _, _ in updates)
        self.num_tokens += num_tokens
        now = int(time.monotonic())
        if self.tokens_by_second[-1][0] < now:
            self.tokens_by_second.append([now, 0])
        self.tokens_by_second[-1][1] += num_tokens
        for update in updates:
            update[0].handle.deliver(*update)

    def stats(self, uptime: float) -> dict[str, Any]:
        """The load and the tokens so far; tokens/s is the average of the last RATE_SECONDS. uptime: in seconds."""
        now = int(time.monotonic())
        recent = sum(count for second, count in self.tokens_by_second if now - RATE_SECONDS <= second < now)
        return {
            "gpu": self.index,  # clients know the index of an engine by this name
            "running": len(self.generations),
            "slots": self.queue.slots.get(self.index, 0),
            "tokens": self.num_tokens,
            "tokens_per_second": round(recent / max(1.0, min(RATE_SECONDS, uptime)), 1),
            "cached_prefix_tokens": self.cached_prefix_tokens,
            "prefix_cache_bytes": self.prefix_cache_bytes,
        }


@dataclass(eq=False)
class ServedModel:
    """A model under its public name, with one engine per device and one queue for all its engines."""

    name: str
    tokenizer: Tokenizer
    config: GPTConfig
    make_engines: Sequence[Callable[[], Engine]]  # one function per device, called in the engine's thread
    queue_size: int  # generations that may wait
    created: float = 0.0  # seconds since 1970

    def __post_init__(self) -> None:
        self.queue = FairQueue(self.queue_size)
        self.threads = [EngineThread(i, self.queue, make_engine) for i, make_engine in enumerate(self.make_engines)]


class Service:
    """All served models, the open responses, and the counters."""

    def __init__(self, models: Iterable[ServedModel], log: Callable[[ResponseHandle], object] = lambda handle: None):
        """The first model is the default. log: called with each response that has ended."""
        self.models = {model.name: model for model in models}
        self.log = log
        self.handles: set[ResponseHandle] = set()
        self.outcomes: Counter[str] = Counter({outcome: 0 for outcome in OUTCOMES})
        self.num_prompt_tokens = 0
        self.is_stopping = False
        self.deadline = math.inf  # on the monotonic clock: when `stop` no longer waits; a second signal sets it to 0
        self.start_time = time.monotonic()

    @property
    def threads(self) -> list[EngineThread]:
        return [thread for model in self.models.values() for thread in model.threads]

    @property
    def status(self) -> str:
        """ "ok" when every model has an engine that is ready; else "loading", "stopping" or "failed"."""
        if self.is_stopping:
            return "stopping"
        if all(model.queue.slots for model in self.models.values()):
            return "ok"
        return "loading" if any(thread.state == "loading" for thread in self.threads) else "failed"

    def start(self) -> None:
        """Starts the engines' threads. Needs a running event loop."""
        for thread in self.threads:
            thread.start()

    def submit(self, model: ServedModel, requests: Sequence[Request], client: str) -> ResponseHandle:
        """
        Queues the requests of one API call. Raises UserError for requests that are not valid, Unavailable while the
        model takes no requests, and QueueFull.
        """
        for request in requests:
            request.validate(model.config)
        handle = ResponseHandle(self, model, requests, client=client)
        try:
            if self.is_stopping:
                raise Unavailable("the server is shutting down")
            if not model.queue.slots:
                raise Unavailable(f"the model {model.name} is not ready")
            if len(requests) > model.queue.capacity:
                raise UserError(f"{len(requests)} completions at once: this server has room for {model.queue.capacity}")
            evicted = model.queue.put(handle.generations)
        except Unavailable:
            self.outcomes["refused"] += len(requests)
            raise
        fail_all(evicted, QueueFull("the queue is full: this request was removed for a client with fewer requests"))
        self.handles.add(handle)
        return handle

    def record(self, handle: ResponseHandle) -> None:
        """Counts and logs a response that has ended; does nothing the second time."""
        if handle in self.handles:
            self.handles.remove(handle)
            self.outcomes.update(generation.finish for generation in handle.generations)
            self.num_prompt_tokens += len(handle.generations[0].request.prompt)
            self.log(handle)

    async def stop(self, seconds: float) -> None:
        """
        Refuses new and waiting requests. Running ones may continue for this many seconds, but not beyond
        self.deadline; then they fail.
        """
        self.is_stopping = True
        for model in self.models.values():
            fail_all(model.queue.clear(), Unavailable("the server is shutting down"))
        self.deadline = min(self.deadline, time.monotonic() + seconds)
        while self.handles and time.monotonic() < self.deadline:
            await asyncio.sleep(0.05)
        for handle in self.handles:
            handle.fail(GenerationFailed("the server shut down before the response was complete"))

    def close(self) -> None:
        """Cancels all open responses and ends the engines' threads after their current step."""
        for handle in list(self.handles):
            handle.close()
        for model in self.models.values():
            model.queue.close()
        for thread in self.threads:
            thread.join(JOIN_SECONDS)

    def stats(self) -> dict[str, Any]:
        """Counters since the start, and the current load."""
        uptime = time.monotonic() - self.start_time
        models = self.models.values()
        devices = [{"model": model.name, **thread.stats(uptime)} for model in models for thread in model.threads]
        summed = ("running", "slots", "tokens", "tokens_per_second", "cached_prefix_tokens", "prefix_cache_bytes")
        return {
            "uptime_seconds": round(uptime, 1),
            "status": self.status,
            "waiting": sum(len(model.queue.waiting) for model in models),
            **{name: sum(device[name] for device in devices) for name in summed},
            "prompt_tokens": self.num_prompt_tokens,
            "answers": dict(self.outcomes),  # completions by outcome
            "devices": devices,
        }
