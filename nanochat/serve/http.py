"""
The HTTP layer of the web chat: JSON and server-sent-event responses, one form for all errors, and limits on connections
and request bodies. Starlette and uvicorn do the rest; each class says where it differs from theirs, and why.
"""

import asyncio
import contextlib
import hmac
import ipaddress
import json
import re
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanochat.common import UserError
from nanochat.serve.scheduler import GenerationFailed, QueueFull, ResponseHandle, Unavailable

MAX_BODY = 2**19  # bytes; the longest valid request, 32,000 characters as six ASCII characters each, is 190 KB
HEAD_SECONDS = 10  # time limit for a client to send a request's head; heuristic, not tuned
BODY_SECONDS = 30  # the same for its body; heuristic, not tuned
RETRY_SECONDS = 5  # value of Retry-After; heuristic, not tuned
OPEN_PATHS = ("/", "/health")  # need no API key
# Pydantic puts the name of the type it tried into an error's location where a field allows several: "str", "list[int]".
TYPE_NAME = re.compile(r"\W|^str$")
NO_STORE = {"Cache-Control": "no-store"}


# ---- responses ----


def to_json(data: Any) -> bytes:
    """Encodes as ASCII, so that text with lone surrogates can be sent too."""
    return json.dumps(data, separators=(",", ":")).encode()


def sse(data: Any) -> bytes:
    """Formats one server-sent event: https://html.spec.whatwg.org/multipage/server-sent-events.html"""
    return b"data: " + to_json(data) + b"\n\n"


class JSON(Response):
    """Like Starlette's JSONResponse, but in ASCII, and never cached."""

    media_type = "application/json"

    def __init__(self, content: Any, status_code: int = 200, headers: dict[str, str] | None = None):
        super().__init__(to_json(content), status_code, NO_STORE | (headers or {}))


class EventStream(StreamingResponse):
    """
    A response of server-sent events. Unlike Starlette's StreamingResponse it always closes the ResponseHandle that the
    events come from, and sends a failure in mid-stream as an event.
    """

    media_type = "text/event-stream"

    def __init__(self, handle: ResponseHandle, chunks: AsyncIterator[bytes], headers: dict[str, str]):
        # X-Accel-Buffering: nginx must not collect the events before it passes them on.
        super().__init__(chunks, headers=NO_STORE | {"X-Accel-Buffering": "no"} | headers)
        self.handle = handle

    @classmethod
    async def start(
        cls, handle: ResponseHandle, chunks: AsyncIterator[bytes], headers: dict[str, str] | None = None
    ) -> "EventStream":
        """Waits for the first chunk, so that a failure before it gets its proper HTTP status."""
        try:
            first = await anext(chunks)
        except BaseException:
            handle.close()
            raise
        return cls(handle, _with_errors(first, chunks), headers or {})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.closing(self.handle):
            await self.stream_response(send)  # RequestGuard watches for clients that disconnect


async def _with_errors(first: bytes, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    try:
        async for chunk in chunks:
            yield chunk
    except (GenerationFailed, Unavailable) as error:
        yield sse({"error": str(error)})


# ---- errors ----


class ApiError(Exception):
    """An HTTP status and a one-line message, sent in OpenAI's form. `param` is the field that caused it."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        *,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers or {}

    def response(self) -> Response:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, kind)
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return JSON({"error": error}, self.status, self.headers)


def add_error_handlers(app: FastAPI) -> None:
    """Sends every exception as an ApiError."""

    def handle(kind: type[Exception], to_api_error: Callable[[Any], ApiError]) -> None:
        async def handler(request: Request, error: Exception) -> Response:
            return to_api_error(error).response()

        app.add_exception_handler(kind, handler)

    handle(ApiError, lambda error: error)
    handle(UserError, lambda error: ApiError(400, str(error)))
    handle(RequestValidationError, _from_validation_error)
    handle(QueueFull, lambda error: _retry_later(429, error, "queue_full"))
    handle(Unavailable, lambda error: _retry_later(503, error, "not_ready"))
    handle(GenerationFailed, lambda error: ApiError(500, str(error)))
    handle(HTTPException, _from_http_exception)
    handle(Exception, lambda error: ApiError(500, "internal error: see the server's log"))


def _retry_later(status: int, error: Exception, code: str) -> ApiError:
    headers = {"Retry-After": str(RETRY_SECONDS)}
    return ApiError(status, f"{error}; try again in {RETRY_SECONDS} s", code=code, headers=headers)


def _from_http_exception(error: HTTPException) -> ApiError:
    messages = {
        400: "the body is not valid JSON",
        404: "not found: there is nothing at this path",
        405: "method not allowed at this path",
    }
    message = messages.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, message, headers=dict(error.headers or {}))


def _from_validation_error(error: RequestValidationError) -> ApiError:
    """Reports the first invalid field. If it may be of several types, pydantic has errors for each of them."""
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


# ---- requests ----


class Connection(H11Protocol):
    """
    Uvicorn's HTTP/1.1 connection with two limits that it lacks: on the time that a client takes to send a request's
    head, and on the requests that a client sends ahead while one is being answered (3 million grew the process by
    100 MB).
    """

    head_timer: asyncio.TimerHandle | None = None  # runs while the connection waits for a head

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._update_head_timer()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._update_head_timer()
        if len(self.conn.trailing_data[0]) > MAX_BODY:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.head_timer:
            self.head_timer.cancel()
        super().connection_lost(exc)

    def _update_head_timer(self) -> None:
        is_waiting = not self.cycle or self.cycle.response_complete
        if is_waiting and not self.head_timer:
            self.head_timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)
        elif self.head_timer and not is_waiting:
            self.head_timer.cancel()
            self.head_timer = None


class RequestGuard:
    """
    Middleware around the app: validates the Host header and the API key, reads the body up to MAX_BODY, and cancels the
    request when its client disconnects, wherever in the app it is.

    What Starlette has differs: its TrustedHostMiddleware cannot allow every IP address, its requests wait for a body of
    any size for as long as it takes, and its responses notice a disconnect only while they stream.
    """

    def __init__(self, app: ASGIApp, api_key: str, hosts: Sequence[str]):
        self.app = app
        self.api_key = api_key.encode()
        self.hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._check_host(scope)
            self._check_key(scope)
            body = await asyncio.wait_for(_read_body(scope, receive), BODY_SECONDS)
        except asyncio.TimeoutError:
            headers = {"Connection": "close"}
            error = ApiError(408, f"the body did not arrive within {BODY_SECONDS} s", headers=headers)
            await error.response()(scope, receive, send)
        except ApiError as error:
            await error.response()(scope, receive, send)
        else:
            if body is not None:
                method = scope["method"].replace("HEAD", "GET")  # uvicorn leaves out the body of its response
                await self._run({**scope, "method": method}, body, receive, send)

    def _check_host(self, scope: Scope) -> None:
        """
        Against DNS rebinding (https://en.wikipedia.org/wiki/DNS_rebinding): a web site can point its own name, though
        no IP address, at this machine, and the browser then lets its scripts use this server. Raises ApiError for a
        name that is not in `hosts`. Requests without a Host header do not come from a browser.
        """
        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        name = ""
        try:
            name = urlsplit(f"//{host}").hostname or ""
            ipaddress.ip_address(name)
        except ValueError as error:
            if self.hosts and host and name not in self.hosts:
                remedy = f"use an IP address or {', '.join(self.hosts)}, or start the server with an API key"
                raise ApiError(403, f"unknown host {host[:100]!r}: {remedy}") from error

    def _check_key(self, scope: Scope) -> None:
        if not self.api_key or scope["path"] in OPEN_PATHS:
            return
        authorization = dict(scope["headers"]).get(b"authorization", b"")
        if not hmac.compare_digest(authorization, b"Bearer " + self.api_key):
            message = "an API key is needed: send the header Authorization: Bearer KEY"
            if authorization:
                message = "the API key is wrong"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def _run(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive_body() -> Message:
            return next(messages, {"type": "http.disconnect"})

        response = asyncio.ensure_future(self.app(scope, receive_body, send))
        disconnect = asyncio.ensure_future(receive())
        try:
            await asyncio.wait({response, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            disconnect.cancel()
            response.cancel()  # does nothing if it is complete
        with contextlib.suppress(asyncio.CancelledError):
            await response


async def _read_body(scope: Scope, receive: Receive) -> bytes | None:
    """Returns the whole body, or None if the client disconnects. Raises ApiError once it is known to be too large."""
    too_large = ApiError(413, f"the body is larger than {MAX_BODY} bytes", headers={"Connection": "close"})
    content_length = dict(scope["headers"]).get(b"content-length", b"0")
    if int(content_length) > MAX_BODY:
        raise too_large
    body = bytearray()
    while (message := await receive())["type"] == "http.request":
        body += message["body"]
        if len(body) > MAX_BODY:
            raise too_large
        if not message["more_body"]:
            return bytes(body)
    return None
