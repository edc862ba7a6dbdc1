"""
The web chat as a FastAPI app: the chat API (nanochat/serve/api.py), the page, and endpoints for operators.

    app = create_app(Service([model]), Defaults())
    uvicorn.run(app)
"""

import base64
import hashlib
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, PlainTextResponse, Response
from starlette.middleware.cors import CORSMiddleware

from nanochat.serve.api import ChatApi, Defaults
from nanochat.serve.http import JSON, RequestGuard, add_error_handlers
from nanochat.serve.scheduler import Service

PAGE = Path(__file__).parent / "ui.html"


def create_app(
    service: Service,
    defaults: Defaults,
    *,
    api_key: str = "",
    cors_origins: Sequence[str] = (),
    hosts: Sequence[str] = (),
) -> FastAPI:
    """
    Returns the app, which starts and closes the service with itself. An empty api_key admits everybody; `hosts` are
    the allowed names in the Host header besides IP addresses, none = any. Raises OSError if the page cannot be read.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        service.close()

    app = FastAPI(title="nanochat", docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=lifespan)
    app.add_middleware(RequestGuard, api_key=api_key, hosts=hosts)
    if cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
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
    # The policy names the page's own scripts by their hash. No other script runs, even if one got into the page.
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", html, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    script_sources = " ".join(f"'sha256-{digest}'" for digest in hashes) or "'none'"
    headers = {
        "Content-Security-Policy": (
            f"default-src 'none'; script-src {script_sources}; style-src 'unsafe-inline'; img-src data:; "
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
        return JSON({"status": service.status, "ready": is_ready}, 200 if is_ready else 503)

    @app.get("/stats")
    async def stats() -> Response:
        return JSON(service.stats())

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return PlainTextResponse(prometheus(service.stats()), media_type="text/plain; version=0.0.4")


def prometheus(stats: dict[str, Any]) -> str:
    """Formats Service.stats() for Prometheus: https://prometheus.io/docs/instrumenting/exposition_formats/"""
    lines: list[str] = []

    def add(name: str, kind: str, help: str, *, values: dict[str, float]) -> None:
        lines.append(f"# HELP nanochat_{name} {help}")
        lines.append(f"# TYPE nanochat_{name} {kind}")
        lines.extend(f"nanochat_{name}{labels} {value}" for labels, value in values.items())

    def by_device(key: str) -> dict[str, float]:
        return {f'{{model="{device["model"]}",gpu="{device["gpu"]}"}}': device[key] for device in stats["devices"]}

    add("uptime_seconds", "gauge", "Seconds since the start.", values={"": stats["uptime_seconds"]})
    add("ready", "gauge", "1 if every model is ready.", values={"": int(stats["status"] == "ok")})
    add("waiting", "gauge", "Completions in the queue.", values={"": stats["waiting"]})
    add("running", "gauge", "Completions being generated.", values=by_device("running"))
    add("slots", "gauge", "Completions that can be generated together.", values=by_device("slots"))
    add("tokens_total", "counter", "Tokens generated.", values=by_device("tokens"))
    add("tokens_per_second", "gauge", "Average of the last minute.", values=by_device("tokens_per_second"))
    add("prompt_tokens_total", "counter", "Tokens of prompts.", values={"": stats["prompt_tokens"]})
    outcomes = {f'{{outcome="{outcome}"}}': count for outcome, count in stats["answers"].items()}
    add("answers_total", "counter", "Completions by outcome.", values=outcomes)
    return "\n".join(lines) + "\n"
