"""
The chat API: request bodies become engine requests, and token events become responses.

    POST /chat/completions       the page's endpoint: one completion as server-sent events, tool calls included
    POST /v1/chat/completions    OpenAI's (https://platform.openai.com/docs/api-reference), whole or streamed
    POST /v1/completions         OpenAI's, for prompts without a chat template
    GET  /v1/models

Data flow, top to bottom in this file: body (validated by pydantic) → prompt token ids → engine.Request → Service.submit
→ tokens of the generations → JSON or server-sent events. Prompts and responses are never logged here.
"""

import json
import re
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException
from starlette.responses import Response, StreamingResponse
from typing_extensions import TypedDict

from nanochat import engine
from nanochat.common import UserError
from nanochat.conversation import PartReader, render_to_fit
from nanochat.serve import scheduler
from nanochat.serve.scheduler import Generation, ResponseHandle, ServedModel, Service
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
RETRY_SECONDS = 5  # value of Retry-After; heuristic, not tuned
NO_STORE = {"Cache-Control": "no-store"}
HTTP_MESSAGES = {  # of errors that Starlette and FastAPI raise, by status
    400: "the body is not valid JSON",
    404: "not found: there is nothing at this path",
    405: "method not allowed at this path",
}
Headers = Mapping[str, str] | None
# If a field allows several types, the path of a pydantic error contains the name of a type ("str", "list[int]"). This
# matches such names, so that messages can leave them out.
TYPE_NAME = re.compile(r"\W|^str$")

# Parameters of OpenAI's API that are not supported, with the values that mean "not used". All other unknown parameters
# are ignored under /v1, because OpenAI's clients send many that make no difference here ("user", "store", …).
UNSUPPORTED: dict[str, list[Any]] = {
    **dict.fromkeys(["presence_penalty", "frequency_penalty", "min_p", "top_logprobs"], [None, 0]),
    **dict.fromkeys(["repetition_penalty", "best_of"], [None, 1]),
    **dict.fromkeys(["tools", "functions"], [None, []]),
    **dict.fromkeys(["tool_choice", "function_call"], [None, "none", "auto"]),
    **dict.fromkeys(["audio", "prediction", "web_search_options"], [None]),
    "response_format": [None, {"type": "text"}],
    "logit_bias": [None, {}],
    "modalities": [None, ["text"]],
    "echo": [None, False],
    "suffix": [None, ""],
}

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

    model_config = ConfigDict(strict=True, extra="allow")  # unknown fields go to model_extra, for the checks below
    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=MAX_TEMPERATURE)
    top_k: int | None = Field(None, ge=0, le=MAX_TOP_K)
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)


class NativeBody(SamplingOptions):
    """Body of the page's endpoint. Rejects unknown fields, which are most likely misspelt."""

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


class ChatBody(OpenAIBody):
    messages: Messages
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)  # the newer name of max_tokens
    logprobs: bool | None = None


class CompletionBody(OpenAIBody):
    prompt: str | TokenIds | Annotated[list[str], FIRST_ERROR] | Annotated[list[TokenIds], FIRST_ERROR]
    logprobs: Literal[0] | None = None  # number of alternatives per token: only the token itself is supported


Body = NativeBody | ChatBody | CompletionBody


# ---- bodies to engine requests ----


def engine_requests(body: Body, model: ServedModel, defaults: engine.Request) -> tuple[list[engine.Request], int]:
    """
    Returns n requests per prompt, with consecutive seeds so that their completions differ, and how many messages were
    dropped from the prompt. Parameters that the body omits are those of `defaults`, except the seed, which is random.
    Raises ApiError or UserError for a body that is not valid.
    """
    given = body.model_dump(include={"temperature", "top_k", "top_p", "max_tokens", "seed"}, exclude_none=True)
    given = {"seed": secrets.randbits(32)} | given
    n = 1
    num_dropped = 0
    if isinstance(body, OpenAIBody):
        n = body.n or 1
        given["logprobs"] = body.logprobs is not None and body.logprobs is not False  # CompletionBody: 0 means yes
    if isinstance(body, ChatBody) and body.max_completion_tokens:
        given["max_tokens"] = body.max_completion_tokens
    template = replace(defaults, **given)
    if isinstance(body, CompletionBody):
        prompts = completion_prompts(body.prompt, model.tokenizer)
    else:
        prompt, num_dropped = chat_prompt(body.messages, model, template.max_tokens)
        prompts = [prompt]
    if n * len(prompts) > MAX_COMPLETIONS:
        raise ApiError(400, f"{n} x {len(prompts)} completions: {MAX_COMPLETIONS} are allowed per call", "n")
    repeated = [prompt for prompt in prompts for _ in range(n)]
    return [replace(template, prompt=p, seed=template.seed + i) for i, p in enumerate(repeated)], num_dropped


def chat_prompt(messages: Sequence[Message], model: ServedModel, max_tokens: int) -> tuple[list[int], int]:
    """
    Returns the prompt's token ids and how many of the oldest messages were dropped to fit the context.

    OpenAI's variants are mapped to nanochat's conversations: the role "developer" becomes "system", and lists of text
    parts become strings, except the assistant's, whose parts may be tool calls.
    """
    conversation: list[dict[str, Any]] = []
    num_characters = 0
    for i, message in enumerate(messages):
        role, content = message["role"], message["content"]
        text = content if isinstance(content, str) else "".join(part["text"] for part in content)
        if len(text) > MAX_CHARACTERS:
            raise ApiError(400, f"message {i} has {len(text)} characters: {MAX_CHARACTERS} are allowed", "messages")
        num_characters += len(text)
        if role != "assistant" and not isinstance(content, str):
            if any(part["type"] != "text" for part in content):
                raise ApiError(400, f"message {i}: the parts of the {role}'s content must be text", "messages")
            content = text
        conversation.append({"role": "system" if role == "developer" else role, "content": content})
    _check_total(num_characters, "messages")
    return render_to_fit({"messages": conversation}, model.tokenizer, model.config.sequence_len, max_tokens)


def completion_prompts(prompt: Any, tokenizer: Tokenizer) -> list[list[int]]:
    """Returns the token ids of one or several prompts that are text or token ids."""
    is_many = isinstance(prompt, list) and any(isinstance(item, str | list) for item in prompt)
    prompts = prompt if is_many else [prompt]
    _check_total(sum(len(each) for each in prompts if isinstance(each, str)), "prompt")
    return [[tokenizer.bos, *tokenizer.encode(each)] if isinstance(each, str) else each for each in prompts]


def _check_total(num_characters: int, field: str) -> None:
    if num_characters > MAX_TOTAL_CHARACTERS:
        raise ApiError(400, f"{num_characters} characters in the {field}: {MAX_TOTAL_CHARACTERS} are allowed", field)


# ---- endpoints ----


async def handle_stack() -> AsyncIterator[ExitStack]:
    """
    FastAPI dependency: a stack for the request's ResponseHandle. The handle is closed when the response has been sent
    or has failed, or its client has disconnected.
    """
    with ExitStack() as stack:
        yield stack


HandleStack = Annotated[ExitStack, Depends(handle_stack)]


class ChatApi:
    """
    The endpoints: each looks up the model, converts the body to engine requests, submits, and responds.

    defaults: the values of the parameters that a body omits. The prompt of `defaults` is not used.
    """

    def __init__(self, service: Service, defaults: engine.Request):
        self.service = service
        self.defaults = defaults

    def add_routes(self, app: FastAPI) -> None:
        app.add_api_route("/chat/completions", self.native, methods=["POST"])
        app.add_api_route("/v1/chat/completions", self.chat_completions, methods=["POST"])
        app.add_api_route("/v1/completions", self.completions, methods=["POST"])
        app.add_api_route("/v1/models", self.models, methods=["GET"])
        app.add_api_route("/v1/models/{name}", self.model, methods=["GET"])

    async def native(self, body: NativeBody, request: Request, stack: HandleStack) -> Response:
        handle, num_dropped = self._submit(body, request, stack)
        return await event_stream(handle, native_events(handle, num_dropped))

    async def chat_completions(self, body: ChatBody, request: Request, stack: HandleStack) -> Response:
        handle, num_dropped = self._submit(body, request, stack)
        return await ResponseBuilder(body, handle).response({"X-Dropped-Messages": str(num_dropped)})

    async def completions(self, body: CompletionBody, request: Request, stack: HandleStack) -> Response:
        handle, _ = self._submit(body, request, stack)
        return await ResponseBuilder(body, handle).response({})

    def _submit(self, body: Body, request: Request, stack: ExitStack) -> tuple[ResponseHandle, int]:
        """Returns the handle, which `stack` closes, and how many messages were dropped from the prompt."""
        model = self._find_model(body.model)
        requests, num_dropped = engine_requests(body, model, self.defaults)
        client = request.client.host if request.client else ""  # the fair queue counts requests per address
        return stack.enter_context(closing(self.service.submit(model, requests, client))), num_dropped

    async def models(self) -> Response:
        return json_response({"object": "list", "data": [describe(model) for model in self.service.models.values()]})

    async def model(self, name: str) -> Response:
        return json_response(describe(self._find_model(name)))

    def _find_model(self, name: str | None) -> ServedModel:
        """Returns the first model if no name is given. Raises ApiError for an unknown name."""
        models = self.service.models
        name = name or next(iter(models))
        if name not in models:
            message = f"no model {name!r}: available are {', '.join(models)}"
            raise ApiError(404, message, "model", code="model_not_found")
        return models[name]


def describe(model: ServedModel) -> dict[str, Any]:
    head = {"id": model.name, "object": "model", "created": int(model.created), "owned_by": "nanochat"}
    return head | {"context_length": model.config.sequence_len}


# ---- responses of the page's endpoint ----


async def native_events(handle: ResponseHandle, num_dropped: int) -> AsyncIterator[bytes]:
    """
    Yields the events of a single completion, one or more at a time: {"token", "gpu"} and, within tool calls, "part";
    at the end the finish reason, the numbers of tokens and the number of messages that were dropped from the prompt.
    """
    (generation,) = handle.generations
    reader = PartReader(handle.model.tokenizer)
    num_read = 0
    async for _ in handle.updates():
        chunk = b""
        for token in generation.tokens[num_read:]:
            kind, text = reader.read(token)
            if text:
                part = {} if kind == "text" else {"part": kind}
                chunk += sse({"token": text, "gpu": generation.engine_index} | part)
        num_read = len(generation.tokens)
        if generation.finish:
            counts = {"prompt_tokens": len(generation.request.prompt), "dropped": num_dropped, "tokens": num_read}
            chunk += sse({"done": True, "finish_reason": generation.finish} | counts)
        if chunk:
            yield chunk


# ---- responses of OpenAI's endpoints ----


class CompletionText:
    """The text of one completion: whole characters only, without tool calls, cut before the first stop string."""

    def __init__(self, generation: Generation, tokenizer: Tokenizer, stops: Sequence[str]):
        self.generation = generation
        self.tokenizer = tokenizer
        self.stops = stops
        self.reader = PartReader(tokenizer)
        self.num_tokens = 0  # read so far
        self.text = ""
        self.num_sent = 0  # characters
        self.finish = ""
        # Log-probabilities of the tokens that are not sent yet, each with the position in the text where it starts.
        self.unsent_logprobs: list[tuple[int, dict[str, Any]]] = []

    def update(self) -> None:
        """Reads the new tokens of the generation, and stops it at a stop string."""
        generation = self.generation
        while self.num_tokens < len(generation.tokens) and not self.finish:
            logprob = generation.logprobs[self.num_tokens] if generation.logprobs else 0.0
            self._add(generation.tokens[self.num_tokens], logprob)
            self.num_tokens += 1
        if self.finish:
            generation.stop(self.finish)
        else:
            self.finish = "length" if generation.finish == "context" else generation.finish

    def _add(self, token: int, logprob: float) -> None:
        kind, text = self.reader.read(token)
        is_special = token >= self.tokenizer.bos  # special tokens have the highest ids, bos is the first of them
        if kind != "text" or is_special:
            return
        start = len(self.text)
        token_bytes = self.tokenizer.decode_bytes([token])
        entry = {"token": token_bytes.decode(errors="replace"), "logprob": logprob, "bytes": list(token_bytes)}
        self.unsent_logprobs.append((start, entry | {"top_logprobs": []}))
        self.text += text
        # A stop string that has just become complete ends within the new text.
        positions = [self.text.find(stop, max(0, start - len(stop) + 1)) for stop in self.stops]
        found = [position for position in positions if position >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.finish = "stop"

    def take(self) -> tuple[str, list[tuple[int, dict[str, Any]]]]:
        """
        Returns the text that is ready to send and not sent yet, with the positions and log-probabilities of its tokens.
        Text that may be the start of a stop string is held back.
        """
        text = self.text[self.num_sent :]
        if not self.finish:
            text = text[: len(text) - self._num_held_back(text)]
        self.num_sent += len(text)
        logprobs = [token for token in self.unsent_logprobs if token[0] < self.num_sent]
        self.unsent_logprobs = self.unsent_logprobs[len(logprobs) :]
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

    def __init__(self, body: ChatBody | CompletionBody, handle: ResponseHandle):
        self.body = body
        self.handle = handle
        self.is_chat = isinstance(body, ChatBody)
        self.texts = [
            CompletionText(generation, handle.model.tokenizer, body.stops) for generation in handle.generations
        ]
        self.head = {
            "id": ("chatcmpl-" if self.is_chat else "cmpl-") + uuid.uuid4().hex,
            "object": "chat.completion" if self.is_chat else "text_completion",
            "created": int(time.time()),
            "model": handle.model.name,
        }

    async def response(self, headers: dict[str, str]) -> Response:
        if self.body.stream:
            return await event_stream(self.handle, self._events(), headers)
        async for _ in self.handle.updates():
            for completion in self.texts:
                completion.update()
        choices = []
        for i, completion in enumerate(self.texts):
            text, logprobs = completion.take()
            message = {"role": "assistant", "content": text, "refusal": None}
            choices.append(self._choice(i, "message", message, logprobs, completion.finish))
        return json_response(self.head | {"choices": choices, "usage": self._usage()}, headers=headers)

    async def _events(self) -> AsyncIterator[bytes]:
        """Yields the response as server-sent events, one or more at a time."""
        includes_usage = self.body.stream_options and self.body.stream_options.include_usage
        head: dict[str, Any] = self.head | ({"usage": None} if includes_usage else {})
        choices: list[dict[str, Any]] = []
        if self.is_chat:
            head["object"] = "chat.completion.chunk"
            choices = [self._choice(i, "delta", {"role": "assistant", "content": ""}) for i in range(len(self.texts))]
        unfinished = dict(enumerate(self.texts))
        async for _ in self.handle.updates():
            for i, completion in list(unfinished.items()):
                completion.update()
                text, logprobs = completion.take()
                if text:
                    choices.append(self._choice(i, "delta", {"content": text}, logprobs))
                if completion.finish:
                    choices.append(self._choice(i, "delta", {}, finish=completion.finish))
                    del unfinished[i]
            if choices:
                yield b"".join(sse(head | {"choices": [choice]}) for choice in choices)
                choices = []
        usage = sse(head | {"choices": [], "usage": self._usage()}) if includes_usage else b""
        yield usage + b"data: [DONE]\n\n"

    def _choice(
        self, i: int, field: str, message: dict[str, Any], logprobs: Any = None, finish: str | None = None
    ) -> dict[str, Any]:
        """In chats the message, or a part of it, has the key `field`; plain completions have only its text."""
        content = {field: message} if self.is_chat else {"text": message.get("content", "")}
        shown_logprobs = None if logprobs is None else self._logprobs(logprobs)
        return {"index": i, **content, "logprobs": shown_logprobs, "finish_reason": finish}

    def _logprobs(self, logprobs: list[tuple[int, dict[str, Any]]]) -> dict[str, Any] | None:
        if not self.handle.generations[0].request.logprobs:
            return None
        if self.is_chat:
            return {"content": [token for _, token in logprobs], "refusal": None}
        return {
            "tokens": [token["token"] for _, token in logprobs],
            "token_logprobs": [token["logprob"] for _, token in logprobs],
            "top_logprobs": None,
            "text_offset": [position for position, _ in logprobs],
        }

    def _usage(self) -> dict[str, int]:
        n = self.body.n or 1  # completions per prompt; a prompt counts once
        num_read = sum(len(generation.request.prompt) for generation in self.handle.generations[::n])
        num_generated = sum(completion.num_tokens for completion in self.texts)
        return {"prompt_tokens": num_read, "completion_tokens": num_generated, "total_tokens": num_read + num_generated}


# ---- response classes and errors ----


def to_json(data: Any) -> bytes:
    """Encodes as ASCII, so that text with lone surrogates can be sent too."""
    return json.dumps(data, separators=(",", ":")).encode()


def json_response(content: Any, status: int = 200, headers: Headers = None) -> Response:
    """Like Starlette's JSONResponse, but in ASCII, and never cached."""
    return Response(to_json(content), status, NO_STORE | dict(headers or {}), media_type="application/json")


def sse(data: Any) -> bytes:
    """Formats one server-sent event: https://html.spec.whatwg.org/multipage/server-sent-events.html"""
    return b"data: " + to_json(data) + b"\n\n"


async def event_stream(handle: ResponseHandle, chunks: AsyncIterator[bytes], headers: Headers = None) -> Response:
    """
    Waits for the first token, so that a failure before it becomes a response with its own HTTP status. A later failure
    is sent as an event.
    """
    await handle.started()
    # X-Accel-Buffering: nginx must not collect the events before it passes them on.
    all_headers = NO_STORE | {"X-Accel-Buffering": "no"} | dict(headers or {})
    return StreamingResponse(_with_failure(chunks), headers=all_headers, media_type="text/event-stream")


async def _with_failure(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    try:
        async for chunk in chunks:
            yield chunk
    except scheduler.FAILURES as error:
        yield sse({"error": str(error)})


class ApiError(HTTPException):
    """An HTTP status and a one-line message, sent in OpenAI's form. `param` is the field that caused it."""

    def __init__(
        self, status: int, message: str, param: str | None = None, *, code: str | None = None, headers: Headers = None
    ):
        super().__init__(status, message, headers)
        self.param = param
        self.code = code

    def response(self) -> Response:
        kind = "invalid_request_error" if self.status_code < 500 else "server_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status_code, kind)
        error = {"message": self.detail, "type": kind, "param": self.param, "code": self.code}
        return json_response({"error": error}, self.status_code, self.headers)


def add_error_handlers(app: FastAPI) -> None:
    """Sends every exception as an ApiError."""

    async def handler(request: Request, error: Exception) -> Response:
        return to_api_error(error).response()

    for kind in (HTTPException, RequestValidationError, UserError, *scheduler.FAILURES, Exception):
        app.add_exception_handler(kind, handler)


def to_api_error(error: Exception) -> ApiError:
    """Returns the error that a client gets for an exception."""
    retry = {"Retry-After": str(RETRY_SECONDS)}
    match error:
        case ApiError():
            return error
        case UserError():
            return ApiError(400, str(error))
        case RequestValidationError():
            return _from_validation_error(error)
        case scheduler.QueueFull():
            return ApiError(429, f"{error}; try again in {RETRY_SECONDS} s", code="queue_full", headers=retry)
        case scheduler.Unavailable():
            return ApiError(503, f"{error}; try again in {RETRY_SECONDS} s", code="not_ready", headers=retry)
        case scheduler.GenerationFailed():
            return ApiError(500, str(error))
        case HTTPException():
            message = HTTP_MESSAGES.get(error.status_code, error.detail)
            return ApiError(error.status_code, message, headers=error.headers)
    return ApiError(500, "internal error: see the server's log")


def _from_validation_error(error: RequestValidationError) -> ApiError:
    """Reports the first invalid field. If it allows several types, pydantic lists errors for each of them."""
    errors = error.errors()
    first = errors[0]
    location = first["loc"]  # ("body", field, …)
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['ctx']['error']} at character {location[-1]}")
    if len(location) < 2:
        return ApiError(400, "the body must be a JSON object, sent with Content-Type: application/json")
    field = location[1]
    messages: dict[str, list[str]] = {}  # by path within the body
    for each in errors:
        if each["loc"][1] == field:
            path = ".".join(str(part) for part in each["loc"][1:] if not TYPE_NAME.search(str(part)))
            messages.setdefault(path, []).append(each["msg"])
    lines = [f"{path}: {', or: '.join(dict.fromkeys(messages[path]))}" for path in messages]
    return ApiError(400, "; ".join(lines[:3]), str(field))
