"""
The web chat: the page, its own endpoint, OpenAI's endpoints, health and numbers.

    app = create_app(Service({"sft": model}), Defaults())
    uvicorn.run(app)

What is asked and answered here is never written down.
"""

import base64
import hashlib
import re
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, PlainTextResponse, Response
from pydantic import ConfigDict, Field
from starlette.middleware.cors import CORSMiddleware

from nanochat import engine
from nanochat.conversation import PartReader, render_to_fit
from nanochat.serve.http import JSON, ApiError, EventStream, Gate, add_error_handlers, event
from nanochat.serve.openai import FIRST, MAX_MESSAGES, ChatBody, CompletionBody, Message, Reply, Settings
from nanochat.serve.scheduler import Model, Service, Stream
from nanochat.tokenizer import Tokenizer

MAX_CHARACTERS, MAX_ALL_CHARACTERS = 8_000, 32_000  # of a message, of all that is sent
MAX_ANSWERS = 16  # to one call: n times the number of prompts; arbitrary


@dataclass(frozen=True)
class Defaults:
    """For what a request does not say."""

    temperature: float = 0.6
    top_k: int = 50
    max_tokens: int = 512


class NativeBody(Settings):
    model_config = ConfigDict(strict=True, extra="allow")
    messages: Annotated[list[Message], FIRST] = Field(min_length=1, max_length=MAX_MESSAGES)

    def check(self) -> None:
        """ApiError for a field that there is not: a wrong name, most likely."""
        for name in self.model_extra or {}:
            known = ", ".join(type(self).model_fields)
            raise ApiError(400, f"{name[:100]}: there is no such field, there are {known}", name[:100])


def create_app(
    service: Service,
    defaults: Defaults,
    api_key: str = "",
    cors_origins: Sequence[str] = (),
    hosts: Sequence[str] = (),  # names that it may be called by, besides addresses; none = any
) -> FastAPI:
    """The app, which starts and ends the service's threads with itself. OSError if the page is not there."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        service.close()

    app = FastAPI(title="nanochat", docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=lifespan)
    app.add_middleware(Gate, api_key=api_key, hosts=hosts)
    if cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After", "X-Dropped-Messages"],
        )
    add_error_handlers(app)
    asker = Asker(service, defaults)
    _add_page(app)
    _add_numbers(app, service)
    _add_native(app, asker)
    _add_openai(app, asker)
    return app


# ---- the page, health, numbers ----


def _add_page(app: FastAPI) -> None:
    html = (Path(__file__).parent / "ui.html").read_text(encoding="utf-8")
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", html, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    ours = " ".join(f"'sha256-{digest}'" for digest in hashes) or "'none'"  # so no other script runs, whoever wrote it
    headers = {
        "Content-Security-Policy": (
            f"default-src 'none'; script-src {ours}; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        ),
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
    lines: list[str] = []

    def add(name: str, kind: str, about: str, values: dict[str, float]) -> None:
        lines.extend([f"# HELP nanochat_{name} {about}", f"# TYPE nanochat_{name} {kind}"])
        lines.extend(f"nanochat_{name}{labels} {value}" for labels, value in values.items())

    def by_device(key: str) -> dict[str, float]:
        return {f'{{model="{device["model"]}",gpu="{device["gpu"]}"}}': device[key] for device in stats["devices"]}

    add("uptime_seconds", "gauge", "Since the start.", {"": stats["uptime_seconds"]})
    add("ready", "gauge", "1 if every model can answer.", {"": int(stats["status"] == "ok")})
    add("waiting", "gauge", "Answers in the queue.", {"": stats["waiting"]})
    add("running", "gauge", "Answers under way.", by_device("running"))
    add("slots", "gauge", "Answers that can be under way together.", by_device("slots"))
    add("tokens_total", "counter", "Tokens generated.", by_device("tokens"))
    add("tokens_per_second", "gauge", "Of the last minute.", by_device("tokens_per_second"))
    add("prompt_tokens_total", "counter", "Tokens of prompts.", {"": stats["prompt_tokens"]})
    outcomes = {f'{{outcome="{outcome}"}}': count for outcome, count in stats["answers"].items()}
    add("answers_total", "counter", "Answers, by what became of them.", outcomes)
    return "\n".join(lines) + "\n"


# ---- answers ----


class Asker:
    """From a request's body to a stream of answers."""

    def __init__(self, service: Service, defaults: Defaults):
        self.service, self.defaults = service, defaults

    def model(self, name: str | None) -> tuple[str, Model]:
        """By default the first. ApiError if there is no such."""
        models = self.service.models
        name = name or next(iter(models))
        if name not in models:
            raise ApiError(404, f"no model {name!r}: there are {', '.join(models)}", "model", "model_not_found")
        return name, models[name]

    def chat_prompt(self, body: NativeBody | ChatBody) -> tuple[list[int], int]:
        """The conversation's tokens, and how many old messages had to be left out. ApiError, UserError: a bad one."""
        _, model = self.model(body.model)
        max_tokens = body.max_tokens or self.defaults.max_tokens
        return render_to_fit(to_conversation(body.messages), model.tokenizer, model.config.sequence_len, max_tokens)

    def submit(
        self, request: Request, body: Settings, prompts: Sequence[list[int]], n: int = 1, **settings: Any
    ) -> Stream:
        """n answers to each prompt, each with a seed of its own. The client, in the queue, is who has the address."""
        if n * len(prompts) > MAX_ANSWERS:
            raise ApiError(400, f"{n} x {len(prompts)} answers: {MAX_ANSWERS} are allowed at once", "n")
        for name, default in vars(self.defaults).items():
            wanted = getattr(body, name)
            settings[name] = default if wanted is None else wanted
        seed = secrets.randbits(32) if body.seed is None else body.seed
        each = [prompt for prompt in prompts for _ in range(n)]
        requests = [engine.Request(prompt, seed=seed + i, **settings) for i, prompt in enumerate(each)]
        name, _ = self.model(body.model)
        return self.service.submit(name, requests, request.client.host if request.client else "")


def to_conversation(messages: list[Message]) -> dict[str, Any]:
    """
    As the protocol has it: only the assistant's content may be parts, and OpenAI's "developer" is the system. ApiError
    beyond the limits.
    """
    texts = [m.content if isinstance(m.content, str) else "".join(p.text for p in m.content) for m in messages]
    for i, text in enumerate(texts):
        if len(text) > MAX_CHARACTERS:
            raise ApiError(400, f"message {i} has {len(text)} characters: {MAX_CHARACTERS} are allowed", "messages")
    total = sum(map(len, texts))
    if total > MAX_ALL_CHARACTERS:
        raise ApiError(400, f"the messages have {total} characters: {MAX_ALL_CHARACTERS} are allowed", "messages")
    conversation: list[dict[str, Any]] = []
    for i, (message, text) in enumerate(zip(messages, texts, strict=True)):
        role, content = "system" if message.role == "developer" else message.role, message.content
        if isinstance(content, str):
            conversation.append({"role": role, "content": content})
        elif role == "assistant":
            conversation.append({"role": role, "content": [part.model_dump() for part in content]})
        elif all(part.type == "text" for part in content):
            conversation.append({"role": role, "content": text})
        else:
            raise ApiError(400, f"message {i}: the {role}'s parts must be text", "messages")
    return {"messages": conversation}


def _add_native(app: FastAPI, asker: Asker) -> None:
    @app.post("/chat/completions")
    async def native(body: NativeBody, request: Request) -> Response:
        body.check()
        prompt, dropped = asker.chat_prompt(body)
        stream = asker.submit(request, body, [prompt])
        end = {"done": True, "prompt_tokens": len(prompt), "dropped": dropped}
        return await EventStream.begin(stream, native_events(stream, asker.model(body.model)[1].tokenizer, end))


async def native_events(stream: Stream, tokenizer: Tokenizer, end: dict[str, Any]) -> AsyncIterator[bytes]:
    """Of one answer, as many at a time as there are; the last one is `end` with what is known by then."""
    reader, num_tokens = PartReader(tokenizer), 0
    async for pieces in stream.batches():
        chunk = b""
        for piece in pieces:
            if piece.token is None:
                chunk += event(end | {"finish_reason": piece.finish, "tokens": num_tokens})
                continue
            num_tokens += 1
            kind, text = reader.read(piece.token)
            if text:
                part = {} if kind == "text" else {"part": kind}
                chunk += event({"token": text, "gpu": piece.device} | part)
        if chunk:
            yield chunk


def _add_openai(app: FastAPI, asker: Asker) -> None:
    def shown(name: str) -> dict[str, Any]:
        model = asker.model(name)[1]
        about = {"id": name, "object": "model", "created": int(model.created), "owned_by": "nanochat"}
        return about | {"context_length": model.config.sequence_len}

    @app.get("/v1/models")
    async def models() -> Response:
        return JSON({"object": "list", "data": [shown(name) for name in asker.service.models]})

    @app.get("/v1/models/{name}")
    async def model(name: str) -> Response:
        return JSON(shown(name))

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        body.check()
        body.max_tokens = body.max_completion_tokens or body.max_tokens
        prompt, dropped = asker.chat_prompt(body)
        return await _answer(asker, request, body, [prompt], {"X-Dropped-Messages": str(dropped)})

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        body.check()
        tokenizer = asker.model(body.model)[1].tokenizer
        total = sum(len(prompt) for prompt in body.prompts if isinstance(prompt, str))
        if total > MAX_ALL_CHARACTERS:
            raise ApiError(400, f"the prompt has {total} characters: {MAX_ALL_CHARACTERS} are allowed", "prompt")
        prompts = [[tokenizer.bos, *tokenizer.encode(p)] if isinstance(p, str) else p for p in body.prompts]
        return await _answer(asker, request, body, prompts, {})


async def _answer(
    asker: Asker,
    request: Request,
    body: ChatBody | CompletionBody,
    prompts: list[list[int]],
    headers: dict[str, str],
) -> Response:
    settings = {"top_p": 1.0 if body.top_p is None else body.top_p, "logprobs": body.wants_logprobs}
    stream = asker.submit(request, body, prompts, body.n or 1, **settings)
    name, model = asker.model(body.model)
    reply = Reply(body, name, stream, model.tokenizer, sum(map(len, prompts)))
    if body.stream:
        return await EventStream.begin(stream, reply.events(), headers)
    with closing(stream):
        return JSON(await reply.whole(), headers=headers)
