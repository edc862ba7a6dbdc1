"""
Load-test client for the web chat: sends many requests at a time and checks every response.

The expected completion of a question is what the server sends when the question is asked alone; sampling is greedy, so
the load must not change it. Requests are HTTP/1.0 over plain sockets, for two reasons: clients must be able to reset a
connection, as a machine does that crashes, and they must leave the CPU to the server, which runs on the same machine
(37 µs per event; httpx needs 106 µs).

    client = LoadClient(port, questions, max_tokens=64)
    await client.sequential()                                 # the first call records the expected completions
    outcomes = client.check(await client.concurrent(64))
"""

import asyncio
import json
import socket
import statistics
import struct
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

HOST = "127.0.0.1"
OUTCOMES = ("answered", "refused", "left", "wrong")  # "left": by the client before the end
RESET = struct.pack("ii", 1, 0)  # SO_LINGER of 0 s: closing resets the connection, as when a machine crashes


@dataclass
class Response:
    """What one client received, with times in seconds since it sent the request."""

    question: int  # index
    status: int = 0  # HTTP status; 0 = no response
    headers: str = ""  # in lower case
    events: list[dict[str, Any]] = field(default_factory=list)
    first_event_time: float = 0.0
    last_event_time: float = 0.0
    left: bool = False  # the client disconnected before the end

    @property
    def last_event(self) -> dict[str, Any]:
        return self.events[-1] if self.events else {}

    @property
    def is_complete(self) -> bool:
        return bool(self.last_event.get("done"))

    @property
    def characters(self) -> list[tuple[str, str]]:
        """(kind of part, character): independent of how the server groups tokens into events."""
        return [(event.get("part", "text"), c) for event in self.events for c in event.get("token", "")]

    @property
    def summary(self) -> list[Any]:
        """The fields of the last event that the load must not change."""
        return [self.last_event.get(key) for key in ("finish_reason", "tokens", "prompt_tokens", "dropped")]


def get_json(port: int, path: str) -> dict[str, Any]:
    """Sends a GET request. Raises OSError if the server cannot be reached or returns an error."""
    with urllib.request.urlopen(f"http://{HOST}:{port}{path}") as response:
        return json.load(response)


class LoadClient:
    """Clients of a server on this machine, the completions they expect, and the problems they found."""

    def __init__(self, port: int, questions: Sequence[str], max_tokens: int):
        self.port = port
        self.questions = questions
        self.max_tokens = max_tokens
        self.expected: list[Response] = []  # by question
        self.problems: Counter[str] = Counter()

    # ---- one request ----

    async def ask(self, question: int, leave_after: int = -1, reset: bool = False) -> Response:
        """Reads the response to its end, or closes or resets the connection after this number of events."""
        response = Response(question)
        start = time.perf_counter()
        try:
            reader, writer = await asyncio.open_connection(HOST, self.port)
            try:
                writer.write(self._request(question))
                if leave_after:
                    await self._read(reader, response, leave_after, start=start)
                is_early = len(response.events) == leave_after and not response.is_complete
                response.left = is_early and response.status in (0, 200)
                if reset:
                    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            finally:
                writer.transport.abort()
        except (OSError, EOFError, ValueError) as error:
            response.events.append({"error": f"{type(error).__name__}: {error}"})
        return response

    def _request(self, question: int) -> bytes:
        messages = [{"role": "user", "content": self.questions[question]}]
        body = json.dumps({"messages": messages, "temperature": 0, "max_tokens": self.max_tokens})
        head = ["POST /chat/completions HTTP/1.0", "Content-Type: application/json", f"Content-Length: {len(body)}"]
        return "\r\n".join([*head, "", body]).encode()

    async def _read(self, reader: asyncio.StreamReader, response: Response, max_events: int, *, start: float) -> None:
        response.headers = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        response.status = int(response.headers.split()[1])
        if response.status != 200:
            response.events.append(json.loads(await reader.read()))
            return
        while len(response.events) != max_events and (line := await reader.readline()):
            if line.startswith(b"data: "):
                response.events.append(json.loads(line[6:]))
                response.last_event_time = time.perf_counter() - start
                response.first_event_time = response.first_event_time or response.last_event_time

    # ---- kinds of load ----

    async def sequential(self) -> list[Response]:
        """Asks every question alone. The first call records the responses as the expected ones."""
        responses = [await self.ask(question) for question in range(len(self.questions))]
        self.expected = self.expected or responses
        return responses

    async def concurrent(self, num_clients: int) -> list[Response]:
        """Sends all requests at once."""
        return await asyncio.gather(*(self.ask(i % len(self.questions)) for i in range(num_clients)))

    async def disconnecting(self, num_clients: int) -> list[Response]:
        """Clients, as many at a time as there are questions, that disconnect in the queue or during the response."""
        limit = asyncio.Semaphore(len(self.questions))

        async def client(i: int) -> Response:
            async with limit:
                return await self.ask(i % len(self.questions), leave_after=i // 2 % 8, reset=i % 2 == 1)

        return await asyncio.gather(*(client(i) for i in range(num_clients)))

    async def mixed(self, num_concurrent: int, num_disconnecting: int) -> list[Response]:
        """Some clients stay while others disconnect; then many arrive at once."""
        staying, leaving = await asyncio.gather(
            self.concurrent(len(self.questions)), self.disconnecting(num_disconnecting)
        )
        return [*staying, *leaving, *await self.concurrent(num_concurrent)]

    # ---- checks ----

    def check(self, responses: Sequence[Response], may_refuse: bool = False) -> dict[str, int]:
        """Returns how many responses had each of OUTCOMES, and records the problems of wrong ones."""
        outcomes = Counter(self._outcome(response, may_refuse) for response in responses)
        return {name: outcomes[name] for name in OUTCOMES}

    def _outcome(self, response: Response, may_refuse: bool) -> str:
        if may_refuse and response.status in (429, 503) and "\r\nretry-after: " in response.headers:
            return "refused"
        expected = self.expected[response.question]
        characters = response.characters
        if response.left and characters == expected.characters[: len(characters)]:
            return "left"
        is_equal = characters == expected.characters and response.summary == expected.summary
        if response.is_complete and is_equal:
            return "answered"
        problem = f"HTTP {response.status}, then {response.last_event}"
        if response.is_complete or response.left:
            problem = "completion differs from that of the same request alone"
        self.problems[problem] += 1
        return "wrong"


def summarize(responses: Sequence[Response], seconds: float) -> dict[str, float]:
    """Throughput and latencies, in seconds, of the complete responses; 0 if there are none."""
    complete = [response for response in responses if response.is_complete]
    first_times = sorted(response.first_event_time for response in complete) or [0.0]
    streaming_times = [response.last_event_time - response.first_event_time for response in complete] or [0.0]
    # Fairness compares responses of equal length: those that ran into max_tokens.
    equally_long = [response for response in complete if response.last_event["finish_reason"] == "length"]
    total_times = [response.last_event_time for response in equally_long]
    return {
        "tokens/s": sum(response.last_event["tokens"] for response in complete) / seconds,
        "first token": first_times[len(first_times) // 2],
        "first of 99%": first_times[len(first_times) * 99 // 100],
        "first to last": statistics.median(streaming_times),
        "fairness": min(total_times) / max(total_times) if total_times else 0.0,
    }
