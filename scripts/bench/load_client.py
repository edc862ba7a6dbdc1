"""
Many users of the web chat at a time, and whether each of them gets what is due.

What a question gets when it is asked alone, greedily, it must get whoever else is there. Requests go over plain
sockets, in HTTP/1.0: clients must be able to leave as rudely as real ones do, and not to take the time that a server on
the same machine needs (37 µs of a CPU per event; httpx 106).

    crowd = Crowd(port, questions, max_tokens=64)
    await crowd.one_by_one()
    outcomes = crowd.judge(await crowd.together(64))
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
OUTCOMES = ("answered", "refused", "left", "wrong")
RESET = struct.pack("ii", 1, 0)  # what is closed without lingering is reset, as by a machine that dies


@dataclass
class Answer:
    """What one client was told, and when, in seconds since it asked."""

    question: int
    status: int = 0  # of HTTP; 0 = none came
    headers: str = ""  # in lower case
    events: list[dict[str, Any]] = field(default_factory=list)
    first: float = 0.0
    seconds: float = 0.0
    left: bool = False  # by the client, before the end

    @property
    def end(self) -> dict[str, Any]:
        return self.events[-1] if self.events else {}

    @property
    def is_complete(self) -> bool:
        return bool(self.end.get("done"))

    @property
    def said(self) -> tuple[Any, ...]:
        """All that may not depend on others. By characters: the server may send several tokens in one event."""
        said = [(event.get("part", "text"), c) for event in self.events for c in event.get("token", "")]
        return said, *(self.end.get(key) for key in ("finish_reason", "tokens", "prompt_tokens", "dropped"))


def get(port: int, path: str) -> dict[str, Any]:
    """OSError if nobody answers, or not with success."""
    with urllib.request.urlopen(f"http://{HOST}:{port}{path}") as response:
        return json.load(response)


class Crowd:
    """Clients of the server on a port of this machine, and what they found wrong."""

    def __init__(self, port: int, questions: Sequence[str], max_tokens: int):
        self.port, self.questions, self.max_tokens = port, questions, max_tokens
        self.expected: list[Answer] = []  # by question
        self.problems: Counter[str] = Counter()

    async def ask(self, question: int, leave_after: int = -1, reset: bool = False) -> Answer:
        """Reads the answer to its end, or leaves after so many events: closes the socket, or resets it."""
        answer, start = Answer(question), time.perf_counter()
        messages = [{"role": "user", "content": self.questions[question]}]
        body = json.dumps({"messages": messages, "temperature": 0, "max_tokens": self.max_tokens})
        head = ("POST /chat/completions HTTP/1.0", "Content-Type: application/json", f"Content-Length: {len(body)}")
        try:
            reader, writer = await asyncio.open_connection(HOST, self.port)
            try:
                writer.write("\r\n".join([*head, "", body]).encode())
                if leave_after:
                    await self._read(reader, answer, leave_after, start)
                answer.left = answer.status in (0, 200) and len(answer.events) == leave_after and not answer.is_complete
                if reset:
                    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            finally:
                writer.transport.abort()
        except (OSError, EOFError, ValueError) as error:
            answer.events.append({"error": f"{type(error).__name__}: {error}"})
        return answer

    async def _read(self, reader: asyncio.StreamReader, answer: Answer, num_events: int, start: float) -> None:
        answer.headers = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        answer.status = int(answer.headers.split()[1])
        if answer.status != 200:
            answer.events.append(json.loads(await reader.read()))
            return
        while len(answer.events) != num_events and (line := await reader.readline()):
            if line.startswith(b"data: "):
                answer.events.append(json.loads(line[6:]))
                answer.seconds = time.perf_counter() - start
                answer.first = answer.first or answer.seconds

    # ---- kinds of load ----

    async def one_by_one(self) -> list[Answer]:
        """Every question alone. The first time, the answers are kept as those to expect."""
        answers = [await self.ask(question) for question in range(len(self.questions))]
        self.expected = self.expected or answers
        return answers

    async def together(self, num_users: int) -> list[Answer]:
        return await asyncio.gather(*(self.ask(i % len(self.questions)) for i in range(num_users)))

    async def leaving(self, num_clients: int) -> list[Answer]:
        """Clients, as many at a time as there are questions, that leave while they wait or amid the answer."""
        places = asyncio.Semaphore(len(self.questions))

        async def client(i: int) -> Answer:
            async with places:
                return await self.ask(i % len(self.questions), leave_after=i // 2 % 8, reset=i % 2 == 1)

        return await asyncio.gather(*(client(i) for i in range(num_clients)))

    async def mixed(self, num_users: int, num_clients: int) -> list[Answer]:
        """Some stay while others leave; then come many."""
        both = await asyncio.gather(self.together(len(self.questions)), self.leaving(num_clients))
        return [*both[0], *both[1], *await self.together(num_users)]

    # ---- what is due ----

    def judge(self, answers: Sequence[Answer], may_refuse: bool = False) -> dict[str, int]:
        """How many had which of OUTCOMES; what was wrong is noted."""
        outcomes = Counter(self._outcome(answer, may_refuse) for answer in answers)
        return {name: outcomes[name] for name in OUTCOMES}

    def _outcome(self, answer: Answer, may_refuse: bool) -> str:
        if may_refuse and answer.status in (429, 503) and "\r\nretry-after: " in answer.headers:
            return "refused"
        (said, *end), (expected, *expected_end) = answer.said, self.expected[answer.question].said
        if answer.left and said == expected[: len(said)]:
            return "left"
        if answer.is_complete and (said, end) == (expected, expected_end):
            return "answered"
        is_other = answer.is_complete or answer.left
        self.problems["another answer than alone" if is_other else f"HTTP {answer.status}, then {answer.end}"] += 1
        return "wrong"


def summary(answers: Sequence[Answer], seconds: float) -> dict[str, float]:
    """What those who had their answers had of it in all these seconds; times in seconds, 0 if there is nobody."""
    complete = [answer for answer in answers if answer.is_complete]
    firsts = sorted(answer.first for answer in complete) or [0.0]
    equal = [answer.seconds for answer in complete if answer.end["finish_reason"] == "length"]
    return {
        "tokens/s": sum(answer.end["tokens"] for answer in complete) / seconds,
        "first token": firsts[len(firsts) // 2],
        "first of 99%": firsts[len(firsts) * 99 // 100],
        "first to last": statistics.median([answer.seconds - answer.first for answer in complete] or [0.0]),
        "fairness": min(equal) / max(equal) if equal else 0.0,  # of those with as many tokens as they asked for
    }
