"""
The chat API: request bodies become engine requests, and token events become responses.

    POST /chat/completions       the page's endpoint: one completion as server-sent events, tool calls included
    POST /v1/chat/completions    OpenAI's (https://platform.openai.com/docs/api-reference), whole or streamed
    POST /v1/completions         OpenAI's, for prompts without a chat template
    GET  /v1/models

Data flow, top to bottom in this file: body (validated by pydantic) → prompt token ids → engine.Request → Service.submit
→ TokenEvents → JSON or server-sent events. Prompts and responses are never logged here.
"""

import itertools
import json
import secrets
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import TypedDict

from nanochat import engine
from nanochat.conversation import PartReader, render_to_fit
from nanochat.serve.http import JSON, ApiError, EventStream, sse
from nanochat.serve.scheduler import ResponseHandle, ServedModel, Service, TokenEvent
from nanochat.tokenizer import Tokenizer

MAX_MESSAGES = 500
MAX_CHARACTERS = 8_000  # per message
MAX_TOTAL_CHARACTERS = 32_000  # of all messages, or of all prompts
MAX_TOKENS = 4096
MAX_TOP_K = 200
MAX_TEMPERATURE = 2.0
MAX_STOPS = 4  # OpenAI's limit
MAX_STOP_CHARACTERS = 200  # heuristic, not tuned
MAX_COMPLETIONS = 16  # per call: n times the number of prompts; heuristic, not tuned

# Parameters of OpenAI's API that are not supported, with the values that leave them off. Unknown ones are ignored on
# OpenAI's endpoints, as its clients send many that make no difference here ("user", "store", …).
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


@dataclass(frozen=True)
class Defaults:
    """Values of the parameters that a request omits."""

    temperature: float = 0.6
    top_k: int = 50
    max_tokens: int = 512


# ---- request bodies ----

FIRST_ERROR = Field(fail_fast=True)  # report only the first invalid item of a list
TokenIds = Annotated[list[int], FIRST_ERROR]


class Part(TypedDict):
    type: str
    text: str


class Message(TypedDict):
    role: str
    content: str | Annotated[list[Part], FIRST_ERROR]


Messages = Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]


class SamplingOptions(BaseModel):
    """The options that all endpoints share."""

    model_config = ConfigDict(strict=True)
    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=MAX_TEMPERATURE)
    top_k: int | None = Field(None, ge=0, le=MAX_TOP_K)
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)

    def engine_request(self, defaults: Defaults) -> engine.Request:
        """Returns an engine request without a prompt."""
        return engine.Request(
            prompt=[],
            max_tokens=defaults.max_tokens if self.max_tokens is None else self.max_tokens,
            temperature=defaults.temperature if self.temperature is None else self.temperature,
            top_k=defaults.top_k if self.top_k is None else self.top_k,
            seed=secrets.randbits(32) if self.seed is None else self.seed,
        )


class NativeBody(SamplingOptions):
    """Body of the page's endpoint. Rejects unknown fields, which are most likely misspelt."""

    model_config = ConfigDict(strict=True, extra="allow")
    messages: Messages

    @model_validator(mode="after")
    def _reject_unknown_fields(self) -> "NativeBody":
        if self.model_extra:
            name = next(iter(self.model_extra))[:100]
            known = ", ".join(type(self).model_fields)
            raise ApiError(400, f"{name}: unknown field; known are {known}", name)
        return self


class StreamOptions(BaseModel):
    include_usage: bool | None = None


class OpenAIBody(SamplingOptions):
    """The fields that both of OpenAI's endpoints have."""

    model_config = ConfigDict(strict=True, extra="allow")
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1)
    stop: str | Annotated[list[str], FIRST_ERROR] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _reject_unsupported_values(self) -> "OpenAIBody":
        for name, value in (self.model_extra or {}).items():
            if name in UNSUPPORTED and value not in UNSUPPORTED[name]:
                supported = " or ".join(json.dumps(neutral) for neutral in UNSUPPORTED[name])
                raise ApiError(400, f"{name}: only {supported} is supported", name, code="unsupported_parameter")
        if len(self.stops) > MAX_STOPS or not all(0 < len(stop) <= MAX_STOP_CHARACTERS for stop in self.stops):
            raise ApiError(400, f"stop: up to {MAX_STOPS} strings of 1 to {MAX_STOP_CHARACTERS} characters", "stop")
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def includes_logprobs(self) -> bool:
        raise NotImplementedError

    def engine_request(self, defaults: Defaults) -> engine.Request:
        top_p = 1.0 if self.top_p is None else self.top_p
        return replace(super().engine_request(defaults), top_p=top_p, logprobs=self.includes_logprobs)


class ChatBody(OpenAIBody):
    messages: Messages
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)  # the newer name of max_tokens
    logprobs: bool | None = None

    @property
    def includes_logprobs(self) -> bool:
        return bool(self.logprobs)

    def engine_request(self, defaults: Defaults) -> engine.Request:
        request = super().engine_request(defaults)
        return replace(request, max_tokens=self.max_completion_tokens or request.max_tokens)


class CompletionBody(OpenAIBody):
    prompt: str | TokenIds | Annotated[list[str], FIRST_ERROR] | Annotated[list[TokenIds], FIRST_ERROR]
    logprobs: Literal[0] | None = None  # number of alternatives per token: only the token itself is supported

    @property
    def includes_logprobs(self) -> bool:
        return self.logprobs is not None

    @property
    def prompts(self) -> list[str | list[int]]:
        is_many = self.prompt and isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        return self.prompt if is_many else [self.prompt]  # type: ignore[list-item, return-value]


# ---- bodies to token ids and engine requests ----


def chat_prompt(messages: Sequence[Message], model: ServedModel, max_tokens: int) -> tuple[list[int], int]:
    """
    Returns the prompt's token ids and how many of the oldest messages were dropped to fit the context. Raises ApiError
    or UserError for messages that are not valid.
    """
    conversation = {"messages": normalize(messages)}
    return render_to_fit(conversation, model.tokenizer, model.config.sequence_len, max_tokens)


def normalize(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """
    Checks the lengths and maps OpenAI's variants to nanochat's conversations: the role "developer" becomes "system",
    and lists of text parts become strings, except the assistant's, whose parts may be tool calls.
    """
    normalized: list[dict[str, Any]] = []
    num_characters = 0
    for i, message in enumerate(messages):
        role, content = message["role"], message["content"]
        text = content if isinstance(content, str) else "".join(part["text"] for part in content)
        if len(text) > MAX_CHARACTERS:
            raise ApiError(400, f"message {i} has {len(text)} characters: {MAX_CHARACTERS} are allowed", "messages")
        num_characters += len(text)
        if role == "developer":
            role = "system"
        if role != "assistant" and not isinstance(content, str):
            if any(part["type"] != "text" for part in content):
                raise ApiError(400, f"message {i}: the parts of the {role}'s content must be text", "messages")
            content = text
        normalized.append({"role": role, "content": content})
    _check_total(num_characters, "messages")
    return normalized


def completion_prompts(prompts: Sequence[str | list[int]], tokenizer: Tokenizer) -> list[list[int]]:
    """Returns the token ids of prompts that are text or token ids."""
    _check_total(sum(len(prompt) for prompt in prompts if isinstance(prompt, str)), "prompt")
    return [[tokenizer.bos, *tokenizer.encode(p)] if isinstance(p, str) else p for p in prompts]


def _check_total(num_characters: int, field: str) -> None:
    if num_characters > MAX_TOTAL_CHARACTERS:
        message = f"{num_characters} characters in the {field}: {MAX_TOTAL_CHARACTERS} are allowed"
        raise ApiError(400, message, field)


def expand(template: engine.Request, prompts: Sequence[list[int]], n: int = 1) -> list[engine.Request]:
    """Returns n requests per prompt with consecutive seeds, so that their completions differ."""
    if n * len(prompts) > MAX_COMPLETIONS:
        raise ApiError(400, f"{n} x {len(prompts)} completions: {MAX_COMPLETIONS} are allowed per call", "n")
    repeated = [prompt for prompt in prompts for _ in range(n)]
    return [replace(template, prompt=prompt, seed=template.seed + i) for i, prompt in enumerate(repeated)]


# ---- endpoints ----


class ChatApi:
    """The endpoints: each parses, looks up the model, submits, and returns the response."""

    def __init__(self, service: Service, defaults: Defaults):
        self.service = service
        self.defaults = defaults

    def add_routes(self, app: FastAPI) -> None:
        app.add_api_route("/chat/completions", self.native, methods=["POST"])
        app.add_api_route("/v1/chat/completions", self.chat_completions, methods=["POST"])
        app.add_api_route("/v1/completions", self.completions, methods=["POST"])
        app.add_api_route("/v1/models", self.models, methods=["GET"])
        app.add_api_route("/v1/models/{name}", self.model, methods=["GET"])

    async def native(self, body: NativeBody, request: Request) -> Response:
        model = self._find_model(body.model)
        template = body.engine_request(self.defaults)
        prompt, num_dropped = chat_prompt(body.messages, model, template.max_tokens)
        handle = self.service.submit(model, [replace(template, prompt=prompt)], _client(request))
        last_event = {"done": True, "prompt_tokens": len(prompt), "dropped": num_dropped}
        return await EventStream.start(handle, native_events(handle, last_event))

    async def chat_completions(self, body: ChatBody, request: Request) -> Response:
        model = self._find_model(body.model)
        template = body.engine_request(self.defaults)
        prompt, num_dropped = chat_prompt(body.messages, model, template.max_tokens)
        requests = expand(template, [prompt], body.n or 1)
        handle = self.service.submit(model, requests, _client(request))
        builder = ResponseBuilder(body, handle, num_prompt_tokens=len(prompt))
        return await _respond(builder, {"X-Dropped-Messages": str(num_dropped)})

    async def completions(self, body: CompletionBody, request: Request) -> Response:
        model = self._find_model(body.model)
        prompts = completion_prompts(body.prompts, model.tokenizer)
        requests = expand(body.engine_request(self.defaults), prompts, body.n or 1)
        handle = self.service.submit(model, requests, _client(request))
        builder = ResponseBuilder(body, handle, num_prompt_tokens=sum(map(len, prompts)))
        return await _respond(builder, {})

    async def models(self) -> Response:
        return JSON({"object": "list", "data": [_describe(model) for model in self.service.models.values()]})

    async def model(self, name: str) -> Response:
        return JSON(_describe(self._find_model(name)))

    def _find_model(self, name: str | None) -> ServedModel:
        """Returns the first model if no name is given. Raises ApiError for an unknown name."""
        models = self.service.models
        name = name or next(iter(models))
        if name not in models:
            message = f"no model {name!r}: available are {', '.join(models)}"
            raise ApiError(404, message, "model", code="model_not_found")
        return models[name]


def _client(request: Request) -> str:
    """The address that the fair queue counts requests by."""
    return request.client.host if request.client else ""


def _describe(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": int(model.created),
        "owned_by": "nanochat",
        "context_length": model.config.sequence_len,
    }


async def _respond(builder: "ResponseBuilder", headers: dict[str, str]) -> Response:
    if builder.body.stream:
        return await EventStream.start(builder.handle, builder.events(), headers)
    with closing(builder.handle):
        return JSON(await builder.whole(), headers=headers)


# ---- responses of the page's endpoint ----


async def native_events(handle: ResponseHandle, last_event: dict[str, Any]) -> AsyncIterator[bytes]:
    """
    Yields the events of a single completion, one or more at a time: {"token", "gpu"} and, within tool calls, "part";
    at the end `last_event` with the finish reason and the number of tokens.
    """
    reader = PartReader(handle.model.tokenizer)
    num_tokens = 0
    async for events in handle.batches():
        chunk = b""
        for event in events:
            if event.token is None:
                chunk += sse(last_event | {"finish_reason": event.finish, "tokens": num_tokens})
                continue
            num_tokens += 1
            kind, text = reader.read(event.token)
            if text:
                part = {} if kind == "text" else {"part": kind}
                chunk += sse({"token": text, "gpu": event.device} | part)
        if chunk:
            yield chunk


# ---- responses of OpenAI's endpoints ----


class CompletionText:
    """The text of one completion: whole characters only, without tool calls, cut before the first stop string."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]):
        self.tokenizer = tokenizer
        self.stops = stops
        self.reader = PartReader(tokenizer)
        self.text = ""
        self.num_sent = 0  # characters
        self.num_tokens = 0
        self.finish = ""
        # Log-probabilities of the tokens that are not sent yet, each with the position in the text where it starts.
        self.unsent_logprobs: deque[tuple[int, dict[str, Any]]] = deque()

    def add(self, event: TokenEvent) -> None:
        """Adds a token, or the end; ignores what comes after a stop string."""
        if self.finish:
            return
        if event.token is None:
            self.finish = "length" if event.finish == "context" else event.finish
            return
        self.num_tokens += 1
        kind, text = self.reader.read(event.token)
        if kind != "text" or event.token >= self.tokenizer.bos:
            return
        start = len(self.text)
        token_bytes = self.tokenizer.decode_bytes([event.token])
        logprob = {
            "token": token_bytes.decode(errors="replace"),
            "logprob": event.logprob,
            "bytes": list(token_bytes),
            "top_logprobs": [],
        }
        self.unsent_logprobs.append((start, logprob))
        self.text += text
        self._cut_at_stop(start)

    def _cut_at_stop(self, start: int) -> None:
        """Looks for a stop string that ends after `start`."""
        positions = [self.text.find(stop, max(0, start - len(stop) + 1)) for stop in self.stops]
        found = [position for position in positions if position >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.finish = "stop"

    def take(self) -> tuple[str, list[dict[str, Any]]]:
        """
        Returns the text that is ready to send and not sent yet, with the log-probabilities of its tokens. What may turn
        out to be the start of a stop string is held back.
        """
        text = self.text[self.num_sent :]
        if not self.finish:
            text = text[: len(text) - self._num_held_back(text)]
        self.num_sent += len(text)
        logprobs = []
        while self.unsent_logprobs and self.unsent_logprobs[0][0] < self.num_sent:
            logprobs.append(self.unsent_logprobs.popleft()[1])
        return text, logprobs

    def _num_held_back(self, text: str) -> int:
        """Returns how many of the last characters could be the start of a stop string."""
        longest = max(map(len, self.stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self.stops):
                return length
        return 0


class ResponseBuilder:
    """Builds the response to one call in OpenAI's form, for chats and for plain completions."""

    def __init__(self, body: ChatBody | CompletionBody, handle: ResponseHandle, num_prompt_tokens: int):
        self.body = body
        self.handle = handle
        self.num_prompt_tokens = num_prompt_tokens
        self.is_chat = isinstance(body, ChatBody)
        self.texts = [CompletionText(handle.model.tokenizer, body.stops) for _ in handle.generations]
        self.head = {
            "id": ("chatcmpl-" if self.is_chat else "cmpl-") + uuid.uuid4().hex,
            "object": "chat.completion" if self.is_chat else "text_completion",
            "created": int(time.time()),
            "model": handle.model.name,
        }

    async def whole(self) -> dict[str, Any]:
        """Waits for all completions and returns the response."""
        async for events in self.handle.batches():
            self._add(events)
        choices = [self._choice(i) for i in range(len(self.texts))]
        return self.head | {"choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncIterator[bytes]:
        """Yields the response as server-sent events, one or more at a time."""
        head: dict[str, Any] = dict(self.head)
        includes_usage = bool(self.body.stream_options and self.body.stream_options.include_usage)
        if includes_usage:
            head["usage"] = None
        chunks: list[dict[str, Any]] = []
        if self.is_chat:
            head["object"] = "chat.completion.chunk"
            chunks = [self._chunk(i, {"role": "assistant", "content": ""}) for i in range(len(self.texts))]
        finished = set()
        async for events in self.handle.batches():
            self._add(events)
            for i in dict.fromkeys(event.generation.index for event in events):
                if i not in finished:
                    chunks += self._new_chunks(i)
                if self.texts[i].finish:
                    finished.add(i)
            if chunks:
                yield b"".join(sse(head | {"choices": [chunk]}) for chunk in chunks)
                chunks = []
        usage = sse(head | {"choices": [], "usage": self._usage()}) if includes_usage else b""
        yield usage + b"data: [DONE]\n\n"

    def _add(self, events: list[TokenEvent]) -> None:
        for event in events:
            i = event.generation.index
            self.texts[i].add(event)
            if self.texts[i].finish:
                self.handle.stop(i, self.texts[i].finish)

    def _choice(self, i: int) -> dict[str, Any]:
        text, logprobs = self.texts[i].take()
        choice: dict[str, Any] = {"index": i}
        if self.is_chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        return choice | {"logprobs": self._logprobs(logprobs, start=0), "finish_reason": self.texts[i].finish}

    def _new_chunks(self, i: int) -> list[dict[str, Any]]:
        """Chunks with the text of completion i that is not sent yet and, at its end, the finish reason."""
        completion = self.texts[i]
        text, logprobs = completion.take()
        chunks = []
        if text:
            content = {"content": text} if self.is_chat else text
            chunks.append(self._chunk(i, content, self._logprobs(logprobs, start=completion.num_sent - len(text))))
        if completion.finish:
            chunks.append(self._chunk(i, {} if self.is_chat else "", finish=completion.finish))
        return chunks

    def _chunk(self, i: int, content: Any, logprobs: Any = None, *, finish: str | None = None) -> dict[str, Any]:
        field = "delta" if self.is_chat else "text"
        return {"index": i, field: content, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, logprobs: list[dict[str, Any]], start: int) -> dict[str, Any] | None:
        """start: number of characters before these tokens."""
        if not self.body.includes_logprobs:
            return None
        if self.is_chat:
            return {"content": logprobs, "refusal": None}
        tokens = [each["token"] for each in logprobs]
        offsets = list(itertools.accumulate(map(len, tokens), initial=start))
        return {
            "tokens": tokens,
            "token_logprobs": [each["logprob"] for each in logprobs],
            "top_logprobs": None,
            "text_offset": offsets[: len(tokens)],
        }

    def _usage(self) -> dict[str, int]:
        num_generated = sum(text.num_tokens for text in self.texts)
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": num_generated,
            "total_tokens": self.num_prompt_tokens + num_generated,
        }
