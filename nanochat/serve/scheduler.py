"""
Many users, few engines: requests wait in a bounded, fair queue; a thread per engine takes them from there; what they
say goes to the event loop, with one call per step of an engine. Nothing of HTTP is in here.

    service = Service({"sft": Model(tokenizer, config, [make_engine], queue_size=128)})
    service.start()                                             # in a running event loop
    stream = service.submit("sft", [Request(prompt)], client="10.0.0.7")
    async for pieces in stream.batches(): …
    stream.close()                                              # in every case: frees places and slots

All of it but FairQueue and Worker.run belongs to the event loop's thread.
"""

import asyncio
import math
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from nanochat.common import UserError
from nanochat.engine import Completion, Engine, Request
from nanochat.gpt import GPTConfig
from nanochat.tokenizer import Tokenizer

RATE_SECONDS = 60  # tokens/s are those of so long
JOIN_SECONDS = 10  # that an engine may take for its last step; arbitrary

# What becomes of an answer: an end token or stop string, max_tokens, the context full; the client went away, the engine
# failed, or there was no room.
OUTCOMES = ("stop", "length", "context", "cancelled", "failed", "refused")


class Unavailable(Exception):
    """Nobody is served now: loading, stopping, or an engine that failed for good."""


class Busy(Unavailable):
    """The queue is full."""


class Failed(Exception):
    """The engine could not go on with this request."""


class Piece(NamedTuple):
    """What a step adds to one of a stream's answers."""

    answer: int  # its number in the stream
    token: int | None  # None at the end
    logprob: float  # of the token, where asked for
    finish: str  # at the end: as in Completion
    device: int  # the engine that says it


@dataclass(eq=False)
class Job:
    """One answer: where it stands."""

    request: Request
    stream: "Stream"
    index: int
    is_cancelled: bool = False  # read by the engine's thread before each step
    tokens: list[int] = field(default_factory=list)
    finish: str = ""


class Stream:
    """The answers to one call, as their tokens come. To be closed by whoever asked."""

    def __init__(self, service: "Service", model: str, requests: Sequence[Request], client: str):
        self.service, self.model, self.client = service, model, client
        self.jobs = [Job(request, self, index) for index, request in enumerate(requests)]
        self.pieces: list[Piece] = []
        self.error: Exception | None = None
        self.wake = asyncio.Event()
        self.start, self.first = time.perf_counter(), 0.0  # seconds; of the first token

    async def batches(self) -> AsyncIterator[list[Piece]]:
        """
        What has come since the last look, in order: a slow listener gets more at a time. Unavailable or Failed, once
        what was said is read.
        """
        while self.pieces or not all(job.finish for job in self.jobs):
            await self.wake.wait()
            self.wake.clear()
            pieces, self.pieces = self.pieces, []
            if pieces:
                yield pieces
            if self.error:
                raise self.error

    def push(self, piece: Piece) -> None:
        job = self.jobs[piece.answer]
        if job.is_cancelled:
            return
        if piece.token is not None:
            job.tokens.append(piece.token)
            self.first = self.first or time.perf_counter()
        job.finish = piece.finish
        self.pieces.append(piece)
        self.wake.set()

    def fail(self, error: Exception) -> None:
        self.error = error
        self.wake.set()

    def end(self, index: int, finish: str) -> None:
        """Enough of this answer: its slot, or its place in the queue, is free at the next step."""
        job = self.jobs[index]
        if not job.finish:
            job.finish, job.is_cancelled = finish, True
            self.service.models[self.model].queue.remove(job)

    def close(self) -> None:
        """Ends what has not ended, and writes it all down. A second time, nothing."""
        finish = "refused" if isinstance(self.error, Unavailable) else "failed" if self.error else "cancelled"
        for job in self.jobs:
            self.end(job.index, finish)
        self.service.forget(self)


def fail(jobs: Iterable[Job], error: Exception) -> None:
    for job in jobs:
        job.stream.fail(error)


class FairQueue:
    """
    Jobs that wait for any of the engines of a model. Next is a job of the client that has the fewest with the engines;
    among equals, of the one whose turn is longest ago. So who sends many waits for himself, and others pass him.
    """

    def __init__(self, size: int):
        self.size = size  # jobs that may wait
        self.condition = threading.Condition()
        self.waiting: dict[str, deque[Job]] = {}  # by client, in the order of their turns
        self.running: Counter[str] = Counter()  # jobs with the engines, by client
        self.slots: dict[int, int] = {}  # of the engines that work, by their number
        self.is_closed = False

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self.waiting.values()))

    @property
    def capacity(self) -> int:
        """Jobs that may wait or run."""
        return sum(self.slots.values()) + self.size

    def put(self, jobs: list[Job]) -> None:
        """
        Busy if there is no room, unless another client has so many waiting that even without the newest of them, which
        make room, it has no fewer than this one.
        """
        client = jobs[0].stream.client
        with self.condition:
            excess = self.num_waiting + self.running.total() + len(jobs) - self.capacity
            if excess > 0:
                longest = max(self.waiting.values(), key=len, default=deque[Job]())
                if len(longest) - excess < len(self.waiting.get(client, ())) + len(jobs):
                    raise Busy(f"all {sum(self.slots.values())} slots and {self.size} places in the queue are taken")
                for _ in range(excess):
                    longest.pop().stream.fail(Busy("others wait too: this client's newest request made room for them"))
            self.waiting.setdefault(client, deque()).extend(jobs)
            self.condition.notify_all()

    def take(self, engine: int, held: int) -> list[Job] | None:
        """Jobs for an engine that holds so many, not more than its share; waits if it holds none. None: it is over."""
        with self.condition:
            while True:
                share = math.ceil((self.num_waiting + self.running.total()) / len(self.slots))
                room = min(share, self.slots[engine]) - held
                jobs = [self._next() for _ in range(min(room, self.num_waiting))]
                if jobs or held:
                    return jobs
                if self.is_closed:
                    return None
                self.condition.wait()

    def _next(self) -> Job:
        client = min(self.waiting, key=self.running.__getitem__)
        jobs = self.waiting.pop(client)
        self.running[client] += 1
        job = jobs.popleft()
        if jobs:
            self.waiting[client] = jobs
        return job

    def done(self, job: Job) -> None:
        """The engine has let go of it."""
        with self.condition:
            self.running[job.stream.client] -= 1
            self.running += Counter()  # forgets clients with none

    def remove(self, job: Job) -> None:
        """Nothing, if it does not wait."""
        client = job.stream.client
        with self.condition:
            if job in self.waiting.get(client, ()):
                self.waiting[client].remove(job)
                if not self.waiting[client]:
                    del self.waiting[client]

    def open(self, engine: int, slots: int) -> None:
        """An engine works from now on; or, with 0 slots, no longer."""
        with self.condition:
            self.slots[engine] = slots
            if not slots:
                del self.slots[engine]
            self.condition.notify_all()

    def clear(self) -> list[Job]:
        with self.condition:
            jobs = [job for jobs in self.waiting.values() for job in jobs]
            self.waiting.clear()
        return jobs

    def close(self) -> None:
        with self.condition:
            self.is_closed = True
            self.condition.notify_all()


class Worker(threading.Thread):
    """
    Owns an engine: adds what the queue has, steps, and hands over what was said. When a step fails, the requests in it
    do, and a new engine goes on, if it can say one token.
    """

    def __init__(self, number: int, queue: FairQueue, make_engine: Callable[[], Engine]):
        super().__init__(name=f"engine {number}", daemon=True)
        self.number, self.queue, self.make_engine = number, queue, make_engine
        self.jobs: dict[int, Job] = {}  # by their number in the engine
        self.state = "loading"
        self.tokens = 0
        self.tokens_at: Counter[int] = Counter()  # by second, of the last minute

    def begin(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.start()

    def run(self) -> None:
        while self._warm_up():
            try:
                self._serve()
                return
            except Exception as error:  # noqa: BLE001  whatever it is, its users are told, and others served
                traceback.print_exc()
                self.state = "loading"
                self.queue.open(self.number, 0)
                self._fail(
                    Failed(f"the engine failed ({type(error).__name__}): try again, perhaps with a shorter text")
                )
        self.state = "failed"
        if not self.queue.slots:
            self._tell(fail, self.queue.clear(), Unavailable("the engine has failed for good"))

    def _warm_up(self) -> bool:
        """Whether there is an engine now, which has said a token."""
        try:
            self.engine = self.make_engine()
            self.engine.generate([Request([self.engine.tokenizer.bos], max_tokens=1)])
        except Exception:  # noqa: BLE001  the server goes on to say that it is not ready
            traceback.print_exc()
            return False
        self.queue.open(self.number, self.engine.num_rows)
        self.state = "ready"
        return True

    def _serve(self) -> None:
        while (jobs := self.queue.take(self.number, len(self.jobs))) is not None:
            for job in jobs:
                self.jobs[self.engine.add(job.request)] = job
            for number in [number for number, job in self.jobs.items() if job.is_cancelled]:
                self.engine.cancel(number)
                self.queue.done(self.jobs.pop(number))
            said = [self._piece(*event) for event in self.engine.step()] if self.jobs else []
            if said:
                self._tell(self._deliver, said)

    def _piece(self, number: int, token: int | None, completion: Completion) -> tuple[Job, Piece]:
        job = self.jobs[number]
        if token is None:
            self.queue.done(self.jobs.pop(number))
            return job, Piece(job.index, None, 0.0, completion.finish, self.number)
        logprob = completion.logprobs[len(completion.tokens) - 1] if completion.logprobs else 0.0
        return job, Piece(job.index, token, logprob, "", self.number)

    def _deliver(self, said: list[tuple[Job, Piece]]) -> None:
        num_tokens = sum(piece.token is not None for _, piece in said)
        self.tokens += num_tokens
        self.tokens_at[int(time.monotonic())] += num_tokens
        for job, piece in said:
            job.stream.push(piece)

    def _fail(self, error: Failed) -> None:
        jobs, self.jobs = list(self.jobs.values()), {}
        for job in jobs:
            self.queue.done(job)
        self._tell(fail, jobs, error)

    def _tell(self, callback: Callable[..., object], *arguments: object) -> None:
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(callback, *arguments)

    def tokens_per_second(self, uptime: float) -> float:
        now = int(time.monotonic())
        for second in [second for second in self.tokens_at if second < now - RATE_SECONDS]:
            del self.tokens_at[second]
        recent = sum(count for second, count in self.tokens_at.items() if second < now)
        return recent / max(1.0, min(RATE_SECONDS, uptime))


class Model:
    """A model to be served: an engine per device, one queue for all of them."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: GPTConfig,
        make_engines: Sequence[Callable[[], Engine]],
        queue_size: int,
        created: float = 0.0,
    ):
        """make_engines: called in the engine's thread; created: seconds since 1970."""
        self.tokenizer, self.config, self.created = tokenizer, config, created
        self.queue = FairQueue(queue_size)
        self.workers = [Worker(number, self.queue, make) for number, make in enumerate(make_engines)]


class Service:
    """All models, the streams under way, and what there is to count."""

    def __init__(self, models: dict[str, Model], log: Callable[[Stream], object] = lambda stream: None):
        """log: called with each stream when it is over."""
        self.models, self.log = models, log
        self.streams: set[Stream] = set()
        self.outcomes: Counter[str] = Counter({key: 0 for key in OUTCOMES})
        self.prompt_tokens = 0
        self.is_stopping, self.deadline = False, math.inf  # of those still served then, on the monotonic clock
        self.begun = time.monotonic()

    @property
    def workers(self) -> list[Worker]:
        return [worker for model in self.models.values() for worker in model.workers]

    @property
    def status(self) -> str:
        """ "ok" when every model has an engine that has said a token; else "loading", "stopping" or "failed"."""
        if self.is_stopping:
            return "stopping"
        if all(model.queue.slots for model in self.models.values()):
            return "ok"
        return "loading" if any(worker.state == "loading" for worker in self.workers) else "failed"

    def start(self) -> None:
        for worker in self.workers:
            worker.begin()

    def submit(self, name: str, requests: Sequence[Request], client: str) -> Stream:
        """UserError for requests that make no sense, Unavailable or Busy if they cannot be served."""
        model = self.models[name]
        for request in requests:
            request.check(model.config)
        stream = Stream(self, name, requests, client)
        try:
            if self.is_stopping or not model.queue.slots:
                raise Unavailable("the server stops" if self.is_stopping else f"the model {name} is not ready")
            if len(requests) > model.queue.capacity:
                raise UserError(f"{len(requests)} answers at once: this server has room for {model.queue.capacity}")
            model.queue.put(stream.jobs)
        except Unavailable:
            self.outcomes["refused"] += len(requests)
            raise
        self.streams.add(stream)
        return stream

    def forget(self, stream: Stream) -> None:
        if stream in self.streams:
            self.streams.remove(stream)
            self.outcomes.update(job.finish for job in stream.jobs)
            self.prompt_tokens += len(stream.jobs[0].request.prompt)
            self.log(stream)

    async def stop(self, seconds: float) -> None:
        """Takes nothing new, turns away what waits, and lets the rest end for so many seconds, or until `deadline`."""
        self.is_stopping = True
        for model in self.models.values():
            fail(model.queue.clear(), Unavailable("the server stops"))
        self.deadline = min(self.deadline, time.monotonic() + seconds)
        while self.streams and time.monotonic() < self.deadline:
            await asyncio.sleep(0.05)
        for stream in self.streams:
            stream.fail(Failed("the server stops: this is as far as the answer came"))

    def close(self) -> None:
        """Ends the threads, after the step that they are at."""
        for stream in list(self.streams):
            stream.close()
        for model in self.models.values():
            model.queue.close()
        for worker in self.workers:
            if worker.is_alive():
                worker.join(JOIN_SECONDS)

    def stats(self) -> dict:
        """Counts since the start, and how it stands now."""
        uptime = time.monotonic() - self.begun
        devices = [
            {
                "model": name,
                "gpu": worker.number,
                "running": len(worker.jobs),
                "slots": model.queue.slots.get(worker.number, 0),
                "tokens": worker.tokens,
                "tokens_per_second": round(worker.tokens_per_second(uptime), 1),
            }
            for name, model in self.models.items()
            for worker in model.workers
        ]
        return {
            "uptime_seconds": round(uptime, 1),
            "status": self.status,
            "waiting": sum(model.queue.num_waiting for model in self.models.values()),
            **{key: sum(d[key] for d in devices) for key in ("running", "slots", "tokens", "tokens_per_second")},  # type: ignore[misc]
            "prompt_tokens": self.prompt_tokens,
            "answers": dict(self.outcomes),
            "devices": devices,
        }
