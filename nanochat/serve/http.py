"""
What the web chat needs of HTTP, whatever is served: answers in JSON or as events, errors in one form, and the gate that
every request comes through.
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
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanochat.common import UserError
from nanochat.serve.scheduler import Busy, Failed, Stream, Unavailable

MAX_BODY = 2**19  # bytes; the longest legal request, 32,000 characters as six of ASCII each, is 190 KB
HEAD_SECONDS, BODY_SECONDS = 10, 30  # that a client may take to send them; arbitrary
RETRY_SECONDS = 5  # after which to try again; arbitrary
OPEN_PATHS = ("/", "/health")  # need no key
TYPE_NAME = re.compile(r"\W|^str$")  # in the place of an error: which of several types it could not be
NO_STORE = {"Cache-Control": "no-store"}


class ApiError(Exception):
    """A status and one line, to be told in OpenAI's form; `param` is the field that it is about."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, **headers: str):
        """headers: with _ for -."""
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def response(self) -> Response:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, kind)
        about = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return JSON({"error": about}, self.status, self.headers)


def to_json(data: Any) -> bytes:
    """In ASCII, so that no text fails on its way, however broken."""
    return json.dumps(data, separators=(",", ":")).encode()


def event(data: Any) -> bytes:
    """https://html.spec.whatwg.org/multipage/server-sent-events.html"""
    return b"data: " + to_json(data) + b"\n\n"


class JSON(Response):
    media_type = "application/json"

    def __init__(self, content: Any, status_code: int = 200, headers: dict[str, str] | None = None):
        super().__init__(to_json(content), status_code, NO_STORE | (headers or {}))


class EventStream(Response):
    """Server-sent events. However their end comes about, it closes the stream that they are made of."""

    media_type = "text/event-stream"

    def __init__(self, stream: Stream, first: bytes, chunks: AsyncIterator[bytes], headers: dict[str, str]):
        super().__init__(headers=NO_STORE | {"X-Accel-Buffering": "no"} | headers)
        del self.headers["content-length"]
        self.stream, self.first, self.chunks = stream, first, chunks

    @classmethod
    async def begin(
        cls, stream: Stream, chunks: AsyncIterator[bytes], headers: dict[str, str] | None = None
    ) -> "EventStream":
        """Once there is a first chunk: what goes wrong before that has a status of its own."""
        try:
            return cls(stream, await anext(chunks), chunks, headers or {})
        except BaseException:
            stream.close()
            raise

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def write(body: bytes, more_body: bool = True) -> None:
            await send({"type": "http.response.body", "body": body, "more_body": more_body})

        with contextlib.closing(self.stream):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await write(self.first)
            try:
                async for chunk in self.chunks:
                    await write(chunk)
            except (Failed, Unavailable) as error:
                await write(event({"error": str(error)}))
            await write(b"", more_body=False)


class Connection(H11Protocol):
    """
    Uvicorn's, which waits for ever for the rest of a request's head and, while it answers, takes in as many further
    requests as a client sends: 3 million made it grow by 100 MB. Here both have bounds.
    """

    timer: asyncio.TimerHandle | None = None  # while a head is due

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._time_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._time_head()
        if len(self.conn.trailing_data[0]) > MAX_BODY:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.timer:
            self.timer.cancel()
        super().connection_lost(exc)

    def _time_head(self) -> None:
        is_due = not self.cycle or self.cycle.response_complete
        if is_due and not self.timer:
            self.timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)
        elif self.timer and not is_due:
            self.timer.cancel()
            self.timer = None


class Gate:
    """
    Around the app: asks for the key, minds by what name it is called, reads the body as far as is allowed, and lets go
    of a request whose client has left, wherever in the app it is.
    """

    def __init__(self, app: ASGIApp, api_key: str, hosts: Sequence[str]):
        self.app, self.api_key, self.hosts = app, api_key.encode(), hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._check_host(scope)
            self._check_key(scope)
            body = await asyncio.wait_for(_read_body(scope, receive), BODY_SECONDS)
        except asyncio.TimeoutError:
            error = ApiError(408, f"the body did not come within {BODY_SECONDS} s", Connection="close")
            await error.response()(scope, receive, send)
        except ApiError as error:
            await error.response()(scope, receive, send)
        else:
            if body is not None:
                method = scope["method"].replace("HEAD", "GET")  # without the answer's body, which uvicorn leaves out
                await self._run({**scope, "method": method}, body, receive, send)

    def _check_host(self, scope: Scope) -> None:
        """
        A site can make its own name, though no address, lead to this machine; then a browser takes its scripts for our
        page's (https://en.wikipedia.org/wiki/DNS_rebinding). ApiError for a name that is not ours.
        """
        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        name = ""
        try:
            name = urlsplit(f"//{host}").hostname or ""
            ipaddress.ip_address(name)
        except ValueError as error:
            if self.hosts and host and name not in self.hosts:
                allowed = f"call it by an address or as {', '.join(self.hosts)}, or give it an API key"
                raise ApiError(403, f"this server does not know the name {host[:100]!r}: {allowed}") from error

    def _check_key(self, scope: Scope) -> None:
        if not self.api_key or scope["path"] in OPEN_PATHS:
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if not hmac.compare_digest(given, b"Bearer " + self.api_key):
            message = "the API key is wrong" if given else "an API key is needed: send Authorization: Bearer KEY"
            raise ApiError(401, message, None, "invalid_api_key", WWW_Authenticate="Bearer")

    async def _run(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive_body() -> Message:
            return next(messages, {"type": "http.disconnect"})

        answering = asyncio.ensure_future(self.app(scope, receive_body, send))
        leaving = asyncio.ensure_future(receive())
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            answering.cancel()  # nothing, if it is done
        with contextlib.suppress(asyncio.CancelledError):
            await answering


async def _read_body(scope: Scope, receive: Receive) -> bytes | None:
    """The whole body; None if the client left meanwhile. ApiError as soon as it is known to be too large."""
    too_large = ApiError(413, f"the body is larger than {MAX_BODY} bytes", Connection="close")
    if int(dict(scope["headers"]).get(b"content-length", b"0")) > MAX_BODY:
        raise too_large
    body = bytearray()
    while (message := await receive())["type"] == "http.request":
        body += message["body"]
        if len(body) > MAX_BODY:
            raise too_large
        if not message["more_body"]:
            return bytes(body)
    return None


def add_error_handlers(app: FastAPI) -> None:
    """Every error becomes an ApiError."""
    wait, later = f"; try again in {RETRY_SECONDS} s", {"Retry_After": str(RETRY_SECONDS)}

    def on(kind: type[Exception], api_error: Callable[[Any], ApiError]) -> None:
        async def handle(request: Request, error: Exception) -> Response:
            return api_error(error).response()

        app.add_exception_handler(kind, handle)

    on(ApiError, lambda error: error)
    on(UserError, lambda error: ApiError(400, str(error)))
    on(RequestValidationError, _invalid)
    on(Busy, lambda error: ApiError(429, f"{error}{wait}", None, "queue_full", **later))
    on(Unavailable, lambda error: ApiError(503, f"{error}{wait}", None, "not_ready", **later))
    on(Failed, lambda error: ApiError(500, str(error)))
    on(HTTPException, _http_error)
    on(Exception, lambda error: ApiError(500, "a fault of the server, which its log describes"))


def _http_error(error: HTTPException) -> ApiError:
    lines = {
        400: "the body cannot be read as JSON",
        404: "there is nothing at this address",
        405: "this address knows other methods",
    }
    api_error = ApiError(error.status_code, lines.get(error.status_code, str(error.detail)))
    api_error.headers |= error.headers or {}
    return api_error


def _invalid(error: RequestValidationError) -> ApiError:
    """What is wrong with the first wrong field. One that may be of several types has a complaint of each of them."""
    errors = error.errors()
    where = errors[0]["loc"]
    if errors[0]["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {errors[0]['ctx']['error']} at character {where[-1]}")
    if len(where) < 2:
        return ApiError(400, "the body must be a JSON object, sent with Content-Type: application/json")
    complaints: dict[str, list[str]] = {}  # by place
    for e in errors:
        if e["loc"][1] == where[1]:
            place = ".".join(str(part) for part in e["loc"][1:] if not TYPE_NAME.search(str(part)))
            complaints.setdefault(place, []).append(e["msg"])
    lines = [f"{place}: {', or: '.join(dict.fromkeys(complaints[place]))}" for place in complaints]
    return ApiError(400, "; ".join(lines[:3]), str(where[1]))
