"""
The web chat over HTTP: the page, its own endpoint, OpenAI's endpoints, health and numbers.

    app = create_app(Service({"sft": model}), Defaults())
    uvicorn.run(app)

Errors are in OpenAI's form everywhere. What a client says and hears is never written down here.
"""

import asyncio
import base64
import hashlib
import hmac
import re
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from nanochat import engine
from nanochat.common import UserError
from nanochat.conversation import PartReader, render_to_fit
from nanochat.openai_api import (
    MAX_ALL_CHARACTERS,
    MAX_ANSWERS,
    MAX_CHARACTERS,
    MAX_MESSAGES,
    ApiError,
    ChatBody,
    CompletionBody,
    Message,
    Reply,
    Settings,
    event,
    to_json,
)
from nanochat.serving import Busy, Failed, Service, Stream, Unavailable

MAX_BODY = 2**20  # bytes
BODY_SECONDS = 30  # a client may take so long to send its body …
SEND_SECONDS = 60  # … and to take in what it is sent; arbitrary
RETRY_SECONDS = 5  # when to try again; arbitrary
OPEN_PATHS = ("/", "/health")  # need no key


@dataclass(frozen=True)
class Defaults:
    """For what a request leaves open."""

    temperature: float = 0.6
    top_k: int = 50
    max_tokens: int = 512


class NativeBody(Settings):
    model_config = ConfigDict(strict=True, extra="forbid")
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)


class JSON(Response):
    media_type = "application/json"

    def __init__(self, content: Any, status_code: int = 200, headers: dict[str, str] | None = None):
        super().__init__(to_json(content), status_code, {"Cache-Control": "no-store"} | (headers or {}))


class EventStream(Response):
    """Server-sent events, and their end: the stream is closed when they are over, however that comes about."""

    media_type = "text/event-stream"

    def __init__(self, stream: Stream, chunks: AsyncIterator[bytes], headers: dict[str, str]):
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"} | headers)
        del self.headers["content-length"]
        self.stream, self.chunks = stream, chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with closing(self.stream):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                async for chunk in self.chunks:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            except (Failed, Unavailable) as error:
                await send({"type": "http.response.body", "body": event({"error": str(error)}), "more_body": True})
            await send({"type": "http.response.body", "body": b""})


class Gate:
    """
    Around the app: asks for the key, reads the body as far as is allowed, and lets go of a request whose client has
    gone, wherever in the app it is.
    """

    def __init__(self, app: ASGIApp, api_key: str):
        self.app, self.api_key = app, api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._check_key(scope)
            body = await asyncio.wait_for(_read_body(scope, receive), BODY_SECONDS)
        except asyncio.TimeoutError:
            await _error(ApiError(408, f"the body did not come within {BODY_SECONDS} s"))(scope, receive, send)
        except ApiError as error:
            await _error(error)(scope, receive, send)
        else:
            if body is not None:
                await self._run(scope, body, receive, send)

    def _check_key(self, scope: Scope) -> None:
        if not self.api_key or scope["path"] in OPEN_PATHS:
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if not hmac.compare_digest(given, b"Bearer " + self.api_key):
            message = "the API key is wrong" if given else "an API key is needed: send Authorization: Bearer KEY"
            raise ApiError(401, message, None, "invalid_api_key", WWW_Authenticate="Bearer")

    async def _run(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive_body() -> Any:
            return next(messages, {"type": "http.disconnect"})

        async def send_in_time(message: Any) -> None:
            await asyncio.wait_for(send(message), SEND_SECONDS)

        answering = asyncio.ensure_future(self.app(scope, receive_body, send_in_time))
        leaving = asyncio.ensure_future(receive())
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            answering.cancel()  # nothing, if it is done
        try:
            await answering
        except asyncio.CancelledError:
            pass


async def _read_body(scope: Scope, receive: Receive) -> bytes | None:
    """The whole body; None if the client left meanwhile. ApiError as soon as it is known to be too large."""
    too_large = ApiError(413, f"the body is larger than {MAX_BODY} bytes", Connection="close")
    declared = dict(scope["headers"]).get(b"content-length", b"0")
    if not declared.isdigit() or int(declared) > MAX_BODY:
        raise too_large
    body = bytearray()
    while (message := await receive())["type"] == "http.request":
        body += message["body"]
        if len(body) > MAX_BODY:
            raise too_large
        if not message["more_body"]:
            return bytes(body)
    return None


def create_app(service: Service, defaults: Defaults, api_key: str = "", cors_origins: Sequence[str] = ()) -> FastAPI:
    """The app; it starts the service's threads with itself and ends them."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        service.close()

    app = FastAPI(title="nanochat", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(Gate, api_key=api_key)
    if cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After", "X-Dropped-Messages"],
        )
    _add_errors(app)
    _add_page(app)
    _add_numbers(app, service)
    _add_native(app, service, defaults)
    _add_openai(app, service, defaults)
    return app


# ---- errors ----


def _error(error: ApiError) -> Response:
    return JSON(error.body(), error.status, error.headers)


def _add_errors(app: FastAPI) -> None:
    later = {"Retry_After": str(RETRY_SECONDS)}

    def on(kind: type[Exception], api_error: Callable[[Any], ApiError]) -> None:
        async def handle(request: Request, error: Exception) -> Response:
            return _error(api_error(error))

        app.add_exception_handler(kind, handle)

    on(ApiError, lambda error: error)
    on(UserError, lambda error: ApiError(400, str(error)))
    on(RequestValidationError, _invalid)
    on(Busy, lambda error: ApiError(429, f"{error}; try again in {RETRY_SECONDS} s", None, "queue_full", **later))
    on(Unavailable, lambda error: ApiError(503, f"{error}; try again in {RETRY_SECONDS} s", None, "not_ready", **later))
    on(Failed, lambda error: ApiError(500, str(error)))
    on(HTTPException, _http_error)
    on(Exception, lambda error: ApiError(500, "a fault of the server, which its log describes"))


def _http_error(error: HTTPException) -> ApiError:
    messages = {404: "there is nothing at this address", 405: "this address knows another method"}
    api_error = ApiError(error.status_code, messages.get(error.status_code, str(error.detail)))
    api_error.headers = dict(error.headers or {})
    return api_error


def _invalid(error: RequestValidationError) -> ApiError:
    """What is wrong with the field that is wrong first; a field of several types has a complaint of each."""
    first, *_ = errors = error.errors()
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][-1]}")
    field = ".".join(str(part) for part in first["loc"][1:2])
    if not field:
        return ApiError(400, "the body must be a JSON object, sent as Content-Type: application/json")
    about = [e for e in errors if e["loc"][1:2] == first["loc"][1:2]]
    lines = [".".join(str(part) for part in e["loc"][1:]) + ": " + e["msg"] for e in about]
    return ApiError(400, "; ".join(lines[:3]), field)


# ---- the page, health, numbers ----


def _add_page(app: FastAPI) -> None:
    html = (Path(__file__).parent / "ui.html").read_text(encoding="utf-8")
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", html, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes) or "'none'"
    policy = (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }

    @app.get("/", response_class=HTMLResponse)
    async def page() -> Response:
        return HTMLResponse(html, headers=headers)


def _add_numbers(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> Response:
        is_ready = service.status == "ok"
        return JSON({"status": service.status, "ready": is_ready}, 200 if is_ready else 503)

    @app.get("/stats")
    async def stats() -> Response:
        return JSON(service.stats())

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return PlainTextResponse(prometheus(service.stats()), media_type="text/plain; version=0.0.4")


def prometheus(stats: dict[str, Any]) -> str:
    """https://prometheus.io/docs/instrumenting/exposition_formats/"""
    metrics: list[tuple[str, str, str, list[tuple[str, float]]]] = [
        ("uptime_seconds", "gauge", "Seconds since the start.", [("", stats["uptime_seconds"])]),
        ("ready", "gauge", "1 if every model can answer.", [("", int(stats["status"] == "ok"))]),
        ("waiting", "gauge", "Answers in the queue.", [("", stats["waiting"])]),
        ("prompt_tokens_total", "counter", "Tokens of prompts.", [("", stats["prompt_tokens"])]),
        (
            "answers_total",
            "counter",
            "Answers by what became of them.",
            [(f'{{outcome="{outcome}"}}', count) for outcome, count in stats["answers"].items()],
        ),
    ]
    for key, name, kind, text in (
        ("running", "running", "gauge", "Answers under way."),
        ("slots", "slots", "gauge", "Answers that can be under way together."),
        ("tokens", "tokens_total", "counter", "Tokens generated."),
    ):
        values = [(f'{{model="{d["model"]}",gpu="{d["gpu"]}"}}', d[key]) for d in stats["devices"]]
        metrics.append((name, kind, text, values))
    lines = []
    for name, kind, text, values in metrics:
        lines += [f"# HELP nanochat_{name} {text}", f"# TYPE nanochat_{name} {kind}"]
        lines += [f"nanochat_{name}{labels} {value}" for labels, value in values]
    return "\n".join(lines) + "\n"


# ---- answers ----


def _model_name(service: Service, wanted: str | None) -> str:
    name = wanted or next(iter(service.models))
    if name not in service.models:
        message = f"no model {name!r}: there are {', '.join(service.models)}"
        raise ApiError(404, message, "model", "model_not_found")
    return name


def _conversation(messages: list[Message]) -> dict[str, Any]:
    """In the protocol's form. Lists of parts are the assistant's; those of others are joined."""
    texts = [m.content if isinstance(m.content, str) else "".join(p.text for p in m.content) for m in messages]
    for i, text in enumerate(texts):
        if len(text) > MAX_CHARACTERS:
            raise ApiError(400, f"message {i} has {len(text)} characters: {MAX_CHARACTERS} are allowed", "messages")
    if sum(map(len, texts)) > MAX_ALL_CHARACTERS:
        all_characters = sum(map(len, texts))
        raise ApiError(
            400, f"the messages have {all_characters} characters: {MAX_ALL_CHARACTERS} are allowed", "messages"
        )
    conversation: list[dict[str, Any]] = []
    for i, (message, text) in enumerate(zip(messages, texts, strict=True)):
        if message.role == "assistant" and not isinstance(message.content, str):
            conversation.append({"role": "assistant", "content": [part.model_dump() for part in message.content]})
            continue
        if not isinstance(message.content, str) and any(part.type != "text" for part in message.content):
            raise ApiError(400, f'message {i}: only parts of type "text" can be read', "messages")
        conversation.append({"role": "system" if message.role == "developer" else message.role, "content": text})
    return {"messages": conversation}


def _request(prompt: list[int], body: Settings, defaults: Defaults, seed: int, **more: Any) -> engine.Request:
    return engine.Request(
        prompt,
        max_tokens=defaults.max_tokens if body.max_tokens is None else body.max_tokens,
        temperature=defaults.temperature if body.temperature is None else body.temperature,
        top_k=defaults.top_k if body.top_k is None else body.top_k,
        seed=seed,
        **more,
    )


def _seed(body: Settings) -> int:
    return secrets.randbits(62) if body.seed is None else body.seed


def _client(request: Request) -> str:
    """Whose turn it is in the queue: the address that the connection comes from."""
    return request.client.host if request.client else ""


async def _event_stream(stream: Stream, chunks: AsyncIterator[bytes], **headers: str) -> Response:
    """Begins with the first chunk: what goes wrong before that has a status."""
    try:
        first = await anext(chunks)
    except BaseException:
        stream.close()
        raise

    async def all_chunks() -> AsyncIterator[bytes]:
        yield first
        async for chunk in chunks:
            yield chunk

    return EventStream(stream, all_chunks(), headers)


def _add_native(app: FastAPI, service: Service, defaults: Defaults) -> None:
    async def events(stream: Stream, tokenizer: Any, prompt_tokens: int, dropped: int) -> AsyncIterator[bytes]:
        reader, tokens = PartReader(tokenizer), 0
        async for pieces in stream.batches():
            chunk = b""
            for piece in pieces:
                if piece.token is None:
                    end = {"done": True, "finish_reason": piece.finish, "tokens": tokens}
                    chunk += event(end | {"prompt_tokens": prompt_tokens, "dropped": dropped})
                    continue
                tokens += 1
                kind, text = reader.read(piece.token)
                if text:
                    part = {} if kind == "text" else {"part": kind}
                    chunk += event({"token": text, "gpu": piece.device, **part})
            if chunk:
                yield chunk

    @app.post("/chat/completions")
    async def native(body: NativeBody, request: Request) -> Response:
        name = _model_name(service, body.model)
        model = service.models[name]
        max_tokens = body.max_tokens or defaults.max_tokens
        conversation = _conversation(body.messages)
        prompt, dropped = render_to_fit(conversation, model.tokenizer, model.config.sequence_len, max_tokens)
        stream = service.submit(name, [_request(prompt, body, defaults, _seed(body))], _client(request))
        return await _event_stream(stream, events(stream, model.tokenizer, len(prompt), dropped))


def _add_openai(app: FastAPI, service: Service, defaults: Defaults) -> None:
    def shown(name: str) -> dict[str, Any]:
        model = service.models[name]
        about = {"id": name, "object": "model", "created": int(model.created), "owned_by": "nanochat"}
        return about | {"context_length": model.config.sequence_len}

    async def answer(
        body: ChatBody | CompletionBody, name: str, prompts: list[list[int]], request: Request, **headers: str
    ) -> Response:
        n, seed = body.n or 1, _seed(body)
        if n * len(prompts) > MAX_ANSWERS:
            raise ApiError(400, f"{n} x {len(prompts)} answers: {MAX_ANSWERS} are allowed at once", "n")
        more = {"top_p": body.top_p or 1.0, "logprobs": body.logprobs is not None and body.logprobs is not False}
        each = [prompt for prompt in prompts for _ in range(n)]
        requests = [_request(prompt, body, defaults, seed + i, **more) for i, prompt in enumerate(each)]
        stream = service.submit(name, requests, _client(request))
        reply = Reply(body, name, stream, service.models[name].tokenizer, sum(map(len, prompts)))
        if body.stream:
            return await _event_stream(stream, reply.events(), **headers)
        with closing(stream):
            return JSON(await reply.whole(), headers=headers)

    @app.get("/v1/models")
    async def models() -> Response:
        return JSON({"object": "list", "data": [shown(name) for name in service.models]})

    @app.get("/v1/models/{name}")
    async def model(name: str) -> Response:
        return JSON(shown(_model_name(service, name)))

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        body.check()
        body.max_tokens = body.max_completion_tokens or body.max_tokens
        name = _model_name(service, body.model)
        model = service.models[name]
        max_tokens = body.max_tokens or defaults.max_tokens
        conversation = _conversation(body.messages)
        prompt, dropped = render_to_fit(conversation, model.tokenizer, model.config.sequence_len, max_tokens)
        return await answer(body, name, [prompt], request, **({"X-Dropped-Messages": str(dropped)} if dropped else {}))

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        body.check()
        name = _model_name(service, body.model)
        tokenizer = service.models[name].tokenizer
        texts = [prompt for prompt in body.prompts if isinstance(prompt, str)]
        if sum(map(len, texts)) > MAX_ALL_CHARACTERS:
            raise ApiError(400, f"the prompt has more than {MAX_ALL_CHARACTERS} characters", "prompt")
        prompts = [[tokenizer.bos, *tokenizer.encode(p)] if isinstance(p, str) else p for p in body.prompts]
        if not prompts:
            raise ApiError(400, "prompt: an empty list", "prompt")
        return await answer(body, name, prompts, request)
