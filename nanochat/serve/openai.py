"""
What OpenAI's clients say and expect to hear: bodies of requests, answers in one piece or as events.

The fields and their shapes: https://platform.openai.com/docs/api-reference
"""

import itertools
import json
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from nanochat.conversation import PartReader
from nanochat.serve.http import ApiError, event
from nanochat.serve.scheduler import Piece, Stream
from nanochat.tokenizer import Tokenizer

MAX_MESSAGES, MAX_TOKENS, MAX_TOP_K, MAX_TEMPERATURE = 500, 4096, 200, 2.0
MAX_STOPS, MAX_STOP_CHARACTERS = 4, 200  # OpenAI's; arbitrary

# What we cannot do, and the values with which it would change nothing. Names that are in no list change nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "min_p": (None, 0),
    "top_logprobs": (None, 0),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
    "echo": (None, False),
    "best_of": (None, 1),
    "suffix": (None, ""),
}

FIRST = Field(fail_fast=True)  # of a list's wrong items, the first is enough to tell
Tokens = Annotated[list[int], FIRST]


class Part(BaseModel):
    model_config = ConfigDict(strict=True)
    type: str
    text: str


class Message(BaseModel):
    model_config = ConfigDict(strict=True)
    role: str
    content: str | Annotated[list[Part], FIRST]


class Settings(BaseModel):
    """How to answer; the server has defaults for what is left out."""

    model_config = ConfigDict(strict=True)
    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=MAX_TEMPERATURE)
    top_k: int | None = Field(None, ge=0, le=MAX_TOP_K)
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)


class StreamOptions(BaseModel):
    include_usage: bool | None = None


class OpenAISettings(Settings):
    model_config = ConfigDict(strict=True, extra="allow")
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1)
    stop: str | Annotated[list[str], FIRST] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def check(self) -> None:
        """ApiError for what we cannot do and what makes no sense."""
        for name, value in (self.model_extra or {}).items():
            if name in UNSUPPORTED and value not in UNSUPPORTED[name]:
                allowed = " or ".join(json.dumps(harmless) for harmless in UNSUPPORTED[name])
                raise ApiError(400, f"{name}: this server knows only {allowed}", name, "unsupported_parameter")
        if len(self.stops) > MAX_STOPS or not all(0 < len(stop) <= MAX_STOP_CHARACTERS for stop in self.stops):
            raise ApiError(400, f"stop: up to {MAX_STOPS} strings of 1 to {MAX_STOP_CHARACTERS} characters", "stop")

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class ChatBody(OpenAISettings):
    messages: Annotated[list[Message], FIRST] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    logprobs: bool | None = None

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.logprobs)


class CompletionBody(OpenAISettings):
    prompt: str | Tokens | Annotated[list[str], FIRST] | Annotated[list[Tokens], FIRST]
    logprobs: Literal[0] | None = None  # how many alternatives to tell of, besides the token itself

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None

    @property
    def prompts(self) -> list[str | list[int]]:
        is_many = self.prompt and isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        return self.prompt if is_many else [self.prompt]  # type: ignore[list-item, return-value]


class Choice:
    """One answer as text: without tool calls, in whole characters, and nothing of a stop string."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]):
        self.tokenizer, self.stops = tokenizer, stops
        self.reader = PartReader(tokenizer)
        self.text = ""
        self.num_told = 0  # characters
        self.entries: deque[tuple[int, dict[str, Any]]] = deque()  # not yet told: where a token begins, its logprob
        self.num_tokens = 0
        self.finish = ""

    def read(self, piece: Piece) -> None:
        """Takes the next piece; after a stop string or the end, none."""
        if self.finish:
            return
        if piece.token is None:
            self.finish = "length" if piece.finish == "context" else piece.finish
            return
        self.num_tokens += 1
        start = len(self.text)
        kind, text = self.reader.read(piece.token)
        if kind != "text" or piece.token >= self.tokenizer.bos:
            return
        spoken = self.tokenizer.decode_bytes([piece.token])
        entry = {"token": spoken.decode(errors="replace"), "logprob": piece.logprob, "bytes": list(spoken)}
        self.entries.append((start, entry | {"top_logprobs": []}))
        self.text += text
        found = [self.text.find(stop, max(0, start - len(stop) + 1)) for stop in self.stops]
        if any(place >= 0 for place in found):
            self.text = self.text[: min(place for place in found if place >= 0)]
            self.finish = "stop"

    def take(self) -> tuple[str, list[dict[str, Any]]]:
        """What can be told by now and was not told before: text, and the log-probabilities of its tokens."""
        untold = self.text[self.num_told :]
        if not self.finish:
            longest = max(map(len, self.stops), default=1) - 1
            held = (n for n in range(min(longest, len(untold)), 0, -1) if self._may_stop(untold[-n:]))
            untold = untold[: len(untold) - next(held, 0)]
        self.num_told += len(untold)
        entries = []
        while self.entries and self.entries[0][0] < self.num_told:
            entries.append(self.entries.popleft()[1])
        return untold, entries

    def _may_stop(self, tail: str) -> bool:
        return any(stop.startswith(tail) for stop in self.stops)


class Reply:
    """Answers to one call in OpenAI's shapes, of chats or of plain completions."""

    def __init__(self, body: ChatBody | CompletionBody, model: str, stream: Stream, tokenizer: Tokenizer, prompts: int):
        """prompts: tokens of all prompts."""
        self.body, self.stream, self.prompt_tokens = body, stream, prompts
        self.is_chat = isinstance(body, ChatBody)
        self.choices = [Choice(tokenizer, body.stops) for _ in stream.jobs]
        prefix, kind = ("chatcmpl", "chat.completion") if self.is_chat else ("cmpl", "text_completion")
        self.head = {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}

    async def whole(self) -> dict[str, Any]:
        async for pieces in self.stream.batches():
            self._read(pieces)
        choices = [self._choice(i, *choice.take(), choice.finish) for i, choice in enumerate(self.choices)]
        return self.head | {"choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events, as many together as there are."""
        head: dict[str, Any] = dict(self.head)
        wants_usage = bool(self.body.stream_options and self.body.stream_options.include_usage)
        if wants_usage:
            head["usage"] = None
        if self.is_chat:
            head["object"] += ".chunk"
            roles = [self._chunk(i, {"role": "assistant", "content": ""}, None, None) for i in range(len(self.choices))]
        else:
            roles = []
        told = [False] * len(self.choices)
        async for pieces in self.stream.batches():
            self._read(pieces)
            chunks, roles = roles, []
            for i in dict.fromkeys(piece.answer for piece in pieces):
                chunks += [] if told[i] else self._chunks(i)
                told[i] = bool(self.choices[i].finish)
            if chunks:
                yield b"".join(event(head | {"choices": [chunk]}) for chunk in chunks)
        yield (event(head | {"choices": [], "usage": self._usage()}) if wants_usage else b"") + b"data: [DONE]\n\n"

    def _read(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            choice = self.choices[piece.answer]
            choice.read(piece)
            if choice.finish:
                self.stream.end(piece.answer, choice.finish)

    def _chunks(self, i: int) -> list[dict[str, Any]]:
        choice = self.choices[i]
        text, entries = choice.take()
        chunks = []
        if text:
            content = {"content": text} if self.is_chat else text
            chunks.append(self._chunk(i, content, self._logprobs(entries, choice.num_told - len(text)), None))
        if choice.finish:
            chunks.append(self._chunk(i, {} if self.is_chat else "", None, choice.finish))
        return chunks

    def _chunk(self, i: int, content: Any, logprobs: Any, finish: str | None) -> dict[str, Any]:
        return {"index": i, "delta" if self.is_chat else "text": content, "logprobs": logprobs, "finish_reason": finish}

    def _choice(self, i: int, text: str, entries: list[dict[str, Any]], finish: str) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.is_chat else {"text": text}
        return {"index": i, **said, "logprobs": self._logprobs(entries, 0), "finish_reason": finish}

    def _logprobs(self, entries: list[dict[str, Any]], start: int) -> dict[str, Any] | None:
        """start: characters before these tokens."""
        if not self.body.wants_logprobs:
            return None
        if self.is_chat:
            return {"content": entries, "refusal": None}
        tokens = [entry["token"] for entry in entries]
        offsets = list(itertools.accumulate(map(len, tokens[:-1]), initial=start))[: len(tokens)]
        logprobs = [entry["logprob"] for entry in entries]
        return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": None, "text_offset": offsets}

    def _usage(self) -> dict[str, int]:
        said = sum(choice.num_tokens for choice in self.choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": said,
            "total_tokens": self.prompt_tokens + said,
        }
