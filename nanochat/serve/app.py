"""
The web chat as a FastAPI app: the chat API (nanochat/serve/api.py), the page, endpoints for operators, and the limits
on connections and requests that Starlette and uvicorn lack.

    app = create_app(Service([model]), Request([], temperature=0.6))
    uvicorn.run(app)
"""

import asyncio
import base64
import hashlib
import hmac
import ipaddress
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, PlainTextResponse, Response
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanochat.request import Request
from nanochat.serve.api import ApiError, ChatApi, add_error_handlers, json_response
from nanochat.serve.scheduler import Service

PAGE = Path(__file__).parent / "ui.html"
MAX_BODY = 2**19  # bytes; the longest valid request, 32,000 characters each written as \uXXXX, has 190 KB
HEAD_SECONDS = 10  # time limit for a client to send a request's head; heuristic, not tuned
BODY_SECONDS = 30  # the same for its body; heuristic, not tuned
OPEN_PATHS = ("/", "/health")  # need no API key


def create_app(
    service: Service, defaults: Request, *, api_key: str = "", origins: Sequence[str] = (), hosts: Sequence[str] = ()
) -> FastAPI:
    """
    Returns the app; it starts and closes the service.

    defaults: the values of the parameters that a body omits; the prompt of `defaults` is not used
    api_key: the key that clients must send; empty = none
    origins: web sites whose pages may use the API (CORS)
    hosts: names allowed in the Host header besides IP addresses; none = any
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        service.close()

    app = FastAPI(title="nanochat", docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=lifespan)
    app.add_middleware(RequestGuard, api_key=api_key, hosts=hosts)
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After", "X-Dropped-Messages"],
        )
    add_error_handlers(app)
    ChatApi(service, defaults).add_routes(app)
    _add_page(app, PAGE.read_text(encoding="utf-8"))
    _add_operator_endpoints(app, service)
    return app


def _add_page(app: FastAPI, html: str) -> None:
    # The policy names the page's own script by its hash. No other script runs, even if one got into the page.
    script = html.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    headers = {
        "Content-Security-Policy": (
            f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        ),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }

    @app.get("/", response_class=HTMLResponse)
    async def page() -> Response:
        return HTMLResponse(html, headers=headers)


def _add_operator_endpoints(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> Response:
        is_ready = service.status == "ok"
        return json_response({"status": service.status, "ready": is_ready}, 200 if is_ready else 503)

    @app.get("/stats")
    async def stats() -> Response:
        return json_response(service.stats())

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return PlainTextResponse(prometheus(service.stats()), media_type="text/plain; version=0.0.4")


def prometheus(stats: dict[str, Any]) -> str:
    """Formats Service.stats() for Prometheus: https://prometheus.io/docs/instrumenting/exposition_formats/"""
    lines: list[str] = []

    def add(name: str, help: str, values: dict[str, float]) -> None:
        """values: number by labels, such as {gpu="0"}; no labels = an empty string."""
        kind = "counter" if name.endswith("_total") else "gauge"
        lines.extend([f"# HELP nanochat_{name} {help}", f"# TYPE nanochat_{name} {kind}"])
        lines.extend(f"nanochat_{name}{labels} {value}" for labels, value in values.items())

    def by_device(key: str) -> dict[str, float]:
        return {f'{{model="{device["model"]}",gpu="{device["gpu"]}"}}': device[key] for device in stats["devices"]}

    add("uptime_seconds", "Seconds since the start.", {"": stats["uptime_seconds"]})
    add("ready", "1 if every model is ready.", {"": int(stats["status"] == "ok")})
    add("waiting", "Completions in the queue.", {"": stats["waiting"]})
    add("running", "Completions being generated.", by_device("running"))
    add("slots", "Completions that can be generated together.", by_device("slots"))
    add("tokens_total", "Tokens generated.", by_device("tokens"))
    add("tokens_per_second", "Average of the last minute.", by_device("tokens_per_second"))
    add("cached_prefix_tokens", "Tokens of cached prefixes.", by_device("cached_prefix_tokens"))
    add("prefix_cache_bytes", "Memory of cached prefixes.", by_device("prefix_cache_bytes"))
    add("prompt_tokens_total", "Tokens of prompts.", {"": stats["prompt_tokens"]})
    outcomes = {f'{{outcome="{outcome}"}}': count for outcome, count in stats["answers"].items()}
    add("answers_total", "Completions by outcome.", outcomes)
    return "\n".join(lines) + "\n"


# ---- limits on connections and requests ----


class Connection(H11Protocol):
    """
    Uvicorn's HTTP/1.1 connection with errors as JSON and two limits that it lacks: on the time that a client takes to
    send a request's head, and on the bytes of further requests that it sends while it waits for a response (3 million
    requests grew the process by 100 MB).
    """

    head_timer: asyncio.TimerHandle | None = None  # runs while the connection waits for a head

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._update_head_timer()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._update_head_timer()
        unread_bytes, _ = self.conn.trailing_data  # those after the current request
        if len(unread_bytes) > MAX_BODY:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.head_timer:
            self.head_timer.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answers what is not HTTP with JSON, like every other error (uvicorn's own answer is plain text)."""
        response = ApiError(
            400, f"{msg.rstrip('.')}: send an HTTP/1.1 request", headers={"Connection": "close"}
        ).response()
        headers = [name + b": " + value for name, value in response.raw_headers]
        self.transport.write(b"\r\n".join([b"HTTP/1.1 400 Bad Request", *headers, b"", bytes(response.body)]))
        self.transport.close()

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
    request as soon as its client disconnects.

    Starlette's own means are not enough: its TrustedHostMiddleware cannot allow every IP address, it waits for a body
    without a time limit, and it notices that a client has disconnected only while it streams the response.
    """

    def __init__(self, app: ASGIApp, api_key: str, hosts: Sequence[str]):
        self.app = app
        self.api_key = api_key.encode()
        self.hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        try:
            self._check_host(headers)
            self._check_key(scope["path"], headers)
            body = await asyncio.wait_for(_read_body(headers, receive), BODY_SECONDS)
        except asyncio.TimeoutError:
            error = ApiError(408, f"the body did not arrive within {BODY_SECONDS} s", headers={"Connection": "close"})
            await error.response()(scope, receive, send)
        except ApiError as error:
            await error.response()(scope, receive, send)
        else:
            if body is not None:
                method = scope["method"].replace("HEAD", "GET")  # HEAD is handled as GET; uvicorn sends no body for it
                await self._run({**scope, "method": method}, body, receive, send)

    def _check_host(self, headers: dict[bytes, bytes]) -> None:
        """
        Raises ApiError for a name that is not in `hosts`. This prevents DNS rebinding
        (https://en.wikipedia.org/wiki/DNS_rebinding): a web site can make its own name resolve to this machine, and
        browsers then allow its scripts to use this server. IP addresses need no check, as a site cannot redirect them.
        A missing header needs none, as browsers always send it.
        """
        host = headers.get(b"host", b"").decode("latin-1")
        name = ""
        try:
            name = urlsplit(f"//{host}").hostname or ""
            ipaddress.ip_address(name)
        except ValueError as error:  # not an IP address
            if self.hosts and host and name not in self.hosts:
                remedy = f"use an IP address or {', '.join(self.hosts)}, or start the server with an API key"
                raise ApiError(403, f"unknown host {host[:100]!r}: {remedy}") from error

    def _check_key(self, path: str, headers: dict[bytes, bytes]) -> None:
        if not self.api_key or path in OPEN_PATHS:
            return
        authorization = headers.get(b"authorization", b"")
        if not hmac.compare_digest(authorization, b"Bearer " + self.api_key):
            needed = "an API key is needed: send the header Authorization: Bearer KEY"
            message = "the API key is wrong" if authorization else needed
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def _run(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_body() -> Message:
            return messages.pop() if messages else await receive()

        response = asyncio.ensure_future(self.app(scope, receive_body, send))
        disconnect = asyncio.ensure_future(receive())
        try:
            await asyncio.wait({response, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            disconnect.cancel()
            response.cancel()  # does nothing if it is complete
        with suppress(asyncio.CancelledError):
            await response


async def _read_body(headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
    """Returns the whole body, or None if the client disconnects. Raises ApiError once it is known to be too large."""
    too_large = ApiError(413, f"the body is larger than {MAX_BODY} bytes", headers={"Connection": "close"})
    if int(headers.get(b"content-length", 0)) > MAX_BODY:
        raise too_large
    body = bytearray()
    while (message := await receive())["type"] == "http.request":
        body += message["body"]
        if len(body) > MAX_BODY:
            raise too_large
        if not message["more_body"]:
            return bytes(body)
    return None
