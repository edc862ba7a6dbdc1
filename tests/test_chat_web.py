"""
The web chat over real connections: the page's endpoint, OpenAI's client, invalid requests, clients that disconnect, a
full queue, and the program from start to shutdown.

    python -m pytest tests/test_chat_web.py
"""

import contextlib
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch
import uvicorn
from conftest import GOLDEN
from factories import save_checkpoint, tiny_engine, tiny_gpt, wait_until

from nanochat.engine import Engine
from nanochat.request import Request
from nanochat.serve import app as serve_app
from nanochat.serve.app import create_app
from nanochat.serve.scheduler import ServedModel, Service
from nanochat.tokenizer import Tokenizer
from scripts import chat_web, make_identity

CONTEXT, V = 256, 1024
HELLO = [{"role": "user", "content": "hello"}]
JSON = {"Content-Type": "application/json"}
RESET = b"\1\0\0\0\0\0\0\0"  # SO_LINGER of 0 s: closing the socket resets the connection


@pytest.fixture(scope="module")
def tiny():
    return tiny_gpt(sequence_len=CONTEXT)


class ScriptedEngine(Engine):
    """A real engine whose decoder returns a fixed list of tokens; with `permits`, each step waits for one."""

    def __init__(self, model, tokenizer, max_slots, script):
        super().__init__(model, tokenizer, max_slots)
        self.script = script
        self.permits = None
        self.decoder.step = self.scripted_step

    def scripted_step(self, tokens, _):
        if self.permits:
            assert self.permits.acquire(timeout=20)
        return [[self.script[sum(entry.completion.sampled)]] for entry in self.active], [[-0.5]] * len(tokens)


@contextlib.contextmanager
def serving(service, max_tokens=8, **options):
    """Runs the server in a thread; yields its URL."""
    app = create_app(service, Request([], max_tokens, temperature=0.6, top_k=50), **options)
    config = uvicorn.Config(app, http=serve_app.Connection, log_level="warning", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=[[listener]])
    thread.start()
    try:
        wait_until(lambda: server.started and service.status != "loading")
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def service(tiny, golden_tokenizer):
    models = [
        ServedModel(name, golden_tokenizer, tiny.config, [lambda: tiny_engine(tiny, golden_tokenizer)], 100, 1.5e9)
        for name in ("sft", "rl")
    ]
    return Service(models)


@pytest.fixture(scope="module")
def url(service):
    with serving(service) as address:
        yield address


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        yield client


@contextlib.contextmanager
def scripted(tiny, tokenizer, tokens, *, max_slots=1, queue_size=2, gated=False, **options):
    """
    Serves an engine that always generates these tokens and then the end token; yields (URL, service, engine). `gated`:
    each step waits for one of engine.permits.
    """
    engine = ScriptedEngine(tiny, tokenizer, max_slots, [*tokens, *[tokenizer.special("<|assistant_end|>")] * 9])
    model = ServedModel("sft", tokenizer, tiny.config, make_engines=[lambda: engine], queue_size=queue_size)
    service = Service([model])
    with serving(service, max_tokens=100, **options) as address:
        engine.permits = threading.Semaphore(0) if gated else None
        try:
            yield address, service, engine
        finally:
            if gated:
                engine.permits.release(10**6)


def events(response):
    """The data of the response's server-sent events, decoded except for "[DONE]"."""
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


def ask(url, messages=HELLO, path="/chat/completions", headers=None, **body):
    return httpx.post(url + path, json={"messages": messages, **body}, headers=headers, timeout=30)


def text_of(response):
    return "".join(event.get("token", "") for event in events(response))


# ---- the page's endpoint ----


@pytest.mark.slow
def test_native_endpoint_streams_what_the_engine_generates(url, tiny, golden_tokenizer):
    response = ask(url, temperature=0)
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-store" and response.headers["x-accel-buffering"] == "no"
    *tokens, end = events(response)
    assert end["done"] and (end["finish_reason"], end["tokens"], end["dropped"]) == ("length", 8, 0)
    special = golden_tokenizer.special
    prompt = [special("<|bos|>"), special("<|user_start|>"), *golden_tokenizer.encode("hello")]
    prompt += [special("<|user_end|>"), special("<|assistant_start|>")]
    assert end["prompt_tokens"] == len(prompt)
    (completion,) = tiny_engine(tiny, golden_tokenizer, max_slots=1).generate([Request(prompt, 8, temperature=0.0)])
    expected = golden_tokenizer.decode([token for token in completion.tokens if token < golden_tokenizer.bos])
    text = "".join(event["token"] for event in tokens)
    assert text and text == expected[: len(text)]
    assert set(expected[len(text) :]) <= {"�"}  # the bytes of an unfinished character are not sent
    assert all(event["gpu"] == 0 for event in tokens)


@pytest.mark.slow
def test_concurrent_requests_get_the_same_completions_as_alone(url):
    questions = [[{"role": "user", "content": f"{i} " * (1 + 7 * i % 40)}] for i in range(12)]
    alone = [events(ask(url, question, temperature=0, max_tokens=30)) for question in questions]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda question: events(ask(url, question, temperature=0, max_tokens=30)), questions))
    assert together == alone and len({str(response) for response in alone}) > 6


def test_native_endpoint_applies_seed_model_and_defaults(url, service):
    assert text_of(ask(url, seed=1)) == text_of(ask(url, seed=1, temperature=0.6, top_k=50, max_tokens=8, model="sft"))
    assert text_of(ask(url, seed=1)) == text_of(ask(url, seed=1, model="rl", temperature=None))
    assert len({text_of(ask(url, seed=seed)) for seed in range(5)} | {text_of(ask(url)), text_of(ask(url))}) > 4


def test_tool_calls_are_labelled_and_can_be_sent_back(tiny, golden_tokenizer):
    encode, special = golden_tokenizer.encode, golden_tokenizer.special
    script = [*encode("So: "), special("<|python_start|>"), *encode("12*13"), special("<|python_end|>"), *encode("né")]
    with scripted(tiny, golden_tokenizer, script) as (url, service, engine):
        *tokens, end = events(ask(url))
        parts = []
        for event in tokens:
            if not parts or parts[-1]["type"] != event.get("part", "text"):
                parts.append({"type": event.get("part", "text"), "text": ""})
            parts[-1]["text"] += event["token"]
        expected = [("text", "So: "), ("python", "12*13"), ("python_output", "156"), ("text", "né")]
        assert [(part["type"], part["text"]) for part in parts] == expected
        assert end["finish_reason"] == "stop"
        again = [*HELLO, {"role": "assistant", "content": parts}, {"role": "user", "content": "and?"}]
        prompt_tokens = events(ask(url, again))[-1]["prompt_tokens"]
        assert prompt_tokens == end["prompt_tokens"] + end["tokens"] + 1 + len(encode("and?")) + 3
        whole = ask(url, path="/v1/chat/completions").json()
        assert whole["choices"][0]["message"]["content"] == "So: né"  # without the tool call
        assert whole["usage"]["completion_tokens"] == end["tokens"]


def test_long_conversation_drops_its_oldest_messages(url):
    turns = [{"role": role, "content": f"{i} " * 20} for i in range(9) for role in ("user", "assistant")][:-1]
    end = events(ask(url, turns))[-1]
    assert end["dropped"] > 0 and end["prompt_tokens"] <= CONTEXT - 8
    response = ask(url, turns, "/v1/chat/completions")
    assert response.headers["x-dropped-messages"] == str(end["dropped"])
    assert response.json()["usage"]["prompt_tokens"] == end["prompt_tokens"]
    assert events(ask(url, max_tokens=4096))[-1]["finish_reason"] == "context"


# ---- OpenAI's client ----


def chat(client, **options):
    return client.chat.completions.create(**{"model": "sft", "messages": HELLO, "max_tokens": 8, **options})


def test_openai_chat_whole_and_streamed_are_equal(client, url):
    whole = chat(client, temperature=0, n=2)
    assert [(c.index, c.finish_reason, c.message.role) for c in whole.choices] == [
        (0, "length", "assistant"),
        (1, "length", "assistant"),
    ]
    assert (
        whole.choices[0].message.content == whole.choices[1].message.content == text_of(ask(url, temperature=0)) != ""
    )
    assert whole.model == "sft" and whole.object == "chat.completion" and whole.id.startswith("chatcmpl-")
    usage = whole.usage
    assert (usage.completion_tokens, usage.total_tokens) == (16, usage.prompt_tokens + 16)
    chunks = list(chat(client, temperature=0, n=2, stream=True, stream_options={"include_usage": True}))
    assert chunks.pop().usage == usage
    assert all(chunk.usage is None and chunk.id == chunks[0].id for chunk in chunks)
    for i in range(2):
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == i]
        assert mine[0].delta.role == "assistant" and mine[-1].finish_reason == "length"
        assert "".join(c.delta.content or "" for c in mine) == whole.choices[i].message.content
        assert not any(c.finish_reason for c in mine[:-1])


def test_openai_n_uses_consecutive_seeds(client):
    def texts(**options):
        return [choice.message.content for choice in chat(client, **options).choices]

    four = texts(seed=7, n=4)
    assert len(set(four)) > 2 and four == texts(seed=7, n=4)
    assert texts(seed=7) == four[:1] and texts(seed=8) == four[1:2]  # seeds are consecutive
    assert texts(seed=7, top_p=1e-6) == texts(temperature=0)
    assert texts(seed=7, extra_body={"top_k": 1}) == texts(temperature=0)


def test_openai_logprobs_equal_the_engines(client, tiny, golden_tokenizer):
    content = chat(client, logprobs=True, top_logprobs=0, seed=3).choices[0].logprobs.content
    assert content and all(token.logprob < 0 and not token.top_logprobs for token in content)
    whole = chat(client, seed=3).choices[0]
    assert whole.logprobs is None
    text = b"".join(bytes(token.bytes) for token in content).decode(errors="ignore")
    assert text.startswith(whole.message.content.replace("�", "")[:3])
    completion = client.completions.create(model="sft", prompt="a b", max_tokens=4, temperature=0, logprobs=0)
    logprobs = completion.choices[0].logprobs
    ids = [golden_tokenizer.bos, *golden_tokenizer.encode("a b")]
    request = Request(ids, 4, temperature=0.0, logprobs=True)
    (expected,) = tiny_engine(tiny, golden_tokenizer, max_slots=1).generate([request])
    ordinary = [p for token, p in zip(expected.tokens, expected.logprobs, strict=True) if token < golden_tokenizer.bos]
    assert logprobs.token_logprobs == pytest.approx(ordinary[: len(logprobs.tokens)], abs=1e-5)
    assert logprobs.text_offset[0] == 0 and len(logprobs.text_offset) == len(logprobs.tokens)


def test_openai_completions_accept_text_and_token_ids(client, golden_tokenizer):
    ids = [[golden_tokenizer.bos, *golden_tokenizer.encode(text)] for text in ("one", "two")]

    def texts(prompt, **options):
        reply = client.completions.create(model="rl", prompt=prompt, temperature=0, max_tokens=6, **options)
        assert [choice.index for choice in reply.choices] == list(range(len(reply.choices)))
        return [choice.text for choice in reply.choices]

    assert texts(["one", "two"]) == texts(ids) == texts("one") + texts(ids[1])
    assert texts(["one", "two"], n=2) == [text for text in texts(ids) for _ in range(2)]
    stream = client.completions.create(model="rl", prompt="one", temperature=0, max_tokens=6, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == texts("one")[0]


def test_openai_models_lists_and_rejects_unknown_names(client):
    assert [model.id for model in client.models.list()] == ["sft", "rl"]
    assert client.models.retrieve("rl").created == 1_500_000_000
    with pytest.raises(openai.NotFoundError, match="no model 'gpt': available are sft, rl"):
        client.models.retrieve("gpt")
    with pytest.raises(openai.NotFoundError, match="no model 'gpt': available are sft, rl"):
        chat(client, model="gpt")


@pytest.mark.slow
@pytest.mark.parametrize(
    "stop, expected",
    [
        ("END", "one two EN três "),
        (["nothing", "três"], "one two EN "),
        (" two EN t", "one"),
        ("zzz", "one two EN três END four"),
        ("four!", "one two EN três END four"),  # its start is sent once it cannot become the stop string
        (["END four", "tr"], "one two EN "),
        (None, "one two EN três END four"),
    ],
)
def test_stop_string_is_never_sent(tiny, golden_tokenizer, stop, expected):
    script = [golden_tokenizer.tokens.index(bytes([byte])) for byte in "one two EN três END four".encode()]
    with scripted(tiny, golden_tokenizer, script) as (url, service, engine):
        body = {"stop": stop, "logprobs": True}
        whole = ask(url, path="/v1/chat/completions", **body).json()
        choice = whole["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (expected, "stop")
        *chunks, done = events(ask(url, path="/v1/chat/completions", stream=True, **body))
        deltas = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
        assert "".join(deltas) == expected and done == "[DONE]"
        streamed = [t for c in chunks for t in (c["choices"][0]["logprobs"] or {"content": []})["content"]]
        for tokens in (choice["logprobs"]["content"], streamed):
            assert b"".join(bytes(token["bytes"]) for token in tokens).decode() == expected
        wait_until(lambda: not service.stats()["running"] and service.stats()["answers"]["stop"] == 2)


def test_make_identity_takes_its_replies_from_this_server(tiny, golden_tokenizer, tmp_path):
    facts = tmp_path / "facts.yaml"
    facts.write_text("name: Pim\n")
    out = tmp_path / "identity.jsonl"
    tokens = golden_tokenizer.encode("Pim it is, at your service.")
    with scripted(tiny, golden_tokenizer, tokens, queue_size=10) as (address, _, _):
        make_identity.main([str(facts), "--out", str(out), "--num", "5", "--endpoint", f"{address}/v1"])
    conversations = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(conversations) == 5
    assert all(any(message["content"] == "Pim it is, at your service." for message in talk) for talk in conversations)


# ---- invalid requests ----


def deep(levels):
    return '{"messages": ' + "[" * levels + "]" * levels + "}"


LONG = [{"role": "user", "content": "a" * 8001}]
MANY = [{"role": "user", "content": "a" * 7000}, {"role": "assistant", "content": "b"}] * 5


@pytest.mark.parametrize(
    "path, body, complaint",
    [
        ("native", "", "must be a JSON object"),
        ("native", "{", "not JSON: .* at character 1"),
        ("native", "[]", "must be a JSON object"),
        ("native", "{}", "messages: Field required"),
        ("native", deep(100_000), "not valid JSON"),
        ("native", {"messages": []}, "at least 1"),
        ("native", {"messages": HELLO, "temprature": 1}, "temprature: unknown field; .* temperature"),
        ("native", {"messages": HELLO, "temperature": 2.1}, "temperature: .*less than or equal to 2"),
        ("native", {"messages": HELLO, "temperature": float("nan")}, "temperature: "),
        ("native", {"messages": HELLO, "temperature": "hot"}, "temperature: .*valid number"),
        ("native", {"messages": HELLO, "top_k": 201}, "top_k: .*less than or equal to 200"),
        ("native", {"messages": HELLO, "max_tokens": 0}, "max_tokens: .*greater than or equal to 1"),
        ("native", {"messages": HELLO, "max_tokens": 4097}, "max_tokens: .*less than or equal to 4096"),
        ("native", {"messages": HELLO, "seed": 2**63}, "seed: "),
        ("native", '{"messages": [{"role": "user", "content": "hi"}], "seed": 1' + "0" * 5000 + "}", "body"),
        ("native", {"messages": [{"role": "user"}]}, "messages.0.content: Field required"),
        ("native", {"messages": [{"role": "tool", "content": "hi"}]}, "message 0: expected role 'user', found 'tool'"),
        ("native", {"messages": HELLO * 2}, "message 1: expected role 'assistant', found 'user'"),
        ("native", {"messages": HELLO * 501}, "at most 500"),
        ("native", {"messages": LONG}, "message 0 has 8001 characters: 8000 are allowed"),
        ("native", {"messages": MANY}, "35005 characters in the messages: 32000 are allowed"),
        ("native", {"messages": [{"role": "user", "content": "hi " * 300}]}, "at most 248 fit"),
        ("native", {"messages": [*HELLO, {"role": "assistant", "content": [{"type": "x", "text": ""}]}]}, "part 0"),
        ("chat", {"messages": HELLO, "tools": [{"type": "function"}]}, r"tools: only null or \[\] is supported"),
        ("chat", {"messages": HELLO, "response_format": {"type": "json_object"}}, "response_format"),
        ("chat", {"messages": HELLO, "frequency_penalty": 0.5}, "frequency_penalty: .*null or 0"),
        ("chat", {"messages": HELLO, "logprobs": True, "top_logprobs": 2}, "top_logprobs: .*null or 0"),
        ("chat", {"messages": HELLO, "n": 17}, "16 are allowed"),
        ("chat", {"messages": HELLO, "n": 10**30}, "16 are allowed"),
        ("chat", {"messages": HELLO, "stop": ["a"] * 5}, "stop: up to 4"),
        ("chat", {"messages": HELLO, "stop": ""}, "stop: .*1 to 200"),
        ("chat", {"messages": HELLO, "top_p": 0}, "top_p: .*greater than 0"),
        ("chat", {"messages": HELLO, "stream": "yes"}, "stream: .*boolean"),
        ("chat", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
        ("chat", {"messages": [{"role": "user", "content": [{"type": "x", "text": ""}]}]}, "content must be text"),
        ("text", {}, "prompt: Field required"),
        ("text", {"prompt": []}, "the prompt is empty"),
        ("text", {"prompt": [[]]}, "the prompt is empty"),
        ("text", {"prompt": [0, V]}, f"the model's vocabulary is 0 to {V - 1}"),
        ("text", {"prompt": ["a"] * 17}, "1 x 17 completions"),
        ("text", {"prompt": "a " * 300}, "the model's context has 256"),
        ("text", {"prompt": "a" * 32001}, "32000 are allowed"),
        ("text", {"prompt": "a", "logprobs": 3}, "logprobs"),
        ("text", {"prompt": "a", "echo": True}, "echo: .*null or false"),
        ("text", {"prompt": ["a", 1]}, r"prompt: .*string; prompt.0: .*integer, or: "),
        ("text", {"prompt": [0.5] * 80_000}, "prompt.0: .*integer, or: "),
        ("native", {f"k{i}": 1 for i in range(30_000)} | {"messages": HELLO}, "k0: unknown field"),
    ],
)
def test_invalid_request_returns_400_with_the_reason(url, service, path, body, complaint):
    path = {"native": "/chat/completions", "chat": "/v1/chat/completions", "text": "/v1/completions"}[path]
    content = body if isinstance(body, str) else json.dumps(body)
    response = httpx.post(url + path, content=content, headers=JSON)
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert error.keys() == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert re.search(complaint, error["message"]), error
    assert "\n" not in error["message"] and len(error["message"]) < 400


@pytest.mark.parametrize(
    "method, path, options, status, complaint",
    [
        ("GET", "/nothing", {}, 404, "nothing at this path"),
        ("GET", "/v1/chat/completions", {}, 405, "method not allowed"),
        ("DELETE", "/", {}, 405, "method not allowed"),
        ("GET", "/v1/models/", {}, 404, "nothing at this path"),
        ("POST", "/chat/completions", {"content": "{}", "headers": {"Content-Type": "text/plain"}}, 400, "JSON object"),
        ("POST", "/chat/completions", {"content": b" " * (serve_app.MAX_BODY + 1)}, 413, "larger than 524288 bytes"),
        ("POST", "/nothing", {"content": iter([b" " * 2**20, b" "])}, 413, "larger than 524288 bytes"),
        (
            "POST",
            "/v1/completions",
            {"content": b'{"prompt": "a", "model": "\\ud800"}', "headers": JSON},
            404,
            "no model",
        ),
        ("POST", "/chat/completions", {"json": {"messages": HELLO, "model": "no"}}, 404, "available are sft, rl"),
    ],
)
def test_http_errors_have_openais_form(url, method, path, options, status, complaint):
    response = httpx.request(method, url + path, **options)
    assert response.status_code == status and complaint in response.json()["error"]["message"]
    assert (status == 405) == ("allow" in response.headers)


def test_body_declared_too_large_is_refused_before_it_arrives(url):
    with connection(url) as sock:
        sock.sendall(b"POST /chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9999999\r\n\r\n")
        assert sock.recv(100).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    "sent",
    [
        b"hello\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nnothing\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",  # the start of TLS
    ],
)
def test_malformed_http_gets_json(url, sent):
    with connection(url) as sock:
        sock.sendall(sent)
        received = b"".join(iter(lambda: sock.recv(2**16), b""))
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ") and b"application/json" in head and b"onnection: close" in head
    error = json.loads(body)["error"]
    assert error["type"] == "invalid_request_error" and error["message"].endswith("send an HTTP/1.1 request")
    assert httpx.get(url + "/health").status_code == 200


def test_slow_body_times_out(url, monkeypatch):
    monkeypatch.setattr(serve_app, "BODY_SECONDS", 0.1)
    with connection(url) as sock:
        sock.sendall(b"POST /chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
        assert sock.recv(100).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("before", [b"", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"])
def test_slow_head_times_out(url, monkeypatch, before):
    monkeypatch.setattr(serve_app, "HEAD_SECONDS", 0.2)
    with connection(url) as sock:
        sock.sendall(before)
        while before and b"ready" not in sock.recv(1000):
            pass
        sock.sendall(b"GET /health HTTP/1.1\r\n")
        assert sock.recv(100) == b""


def test_client_that_only_sends_is_disconnected(url):
    with connection(url) as sock, pytest.raises(ConnectionError):
        sock.settimeout(20)
        while True:
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 10_000)


def test_lone_surrogate_is_read_as_replacement_character(url):
    texts = []
    for character in ("\ud800", "�"):
        content = json.dumps({"messages": [{"role": "user", "content": character}], "temperature": 0})
        texts.append(text_of(httpx.post(url + "/chat/completions", content=content, headers=JSON)))
    assert texts[0] == texts[1] != ""


def test_openai_neutral_parameters_are_accepted(client):
    harmless = {"user": "me", "metadata": {"a": "b"}, "store": False, "parallel_tool_calls": True, "tools": []}
    harmless |= {"presence_penalty": 0, "logit_bias": {}, "response_format": {"type": "text"}, "tool_choice": "none"}
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    system = {"role": "developer", "content": "be brief"}
    plain = chat(client, temperature=0).choices[0].message.content
    assert chat(client, temperature=0, **harmless).choices[0].message.content == plain
    assert (
        chat(client, messages=[{"role": "user", "content": parts}], temperature=0).choices[0].message.content == plain
    )
    briefly = chat(client, messages=[system, *HELLO], temperature=0)
    joined = chat(client, messages=[{"role": "user", "content": "be brief\n\nhello"}], temperature=0)
    assert briefly.choices[0].message == joined.choices[0].message


@pytest.mark.slow
def test_fuzzed_requests_never_return_5xx(url):
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings

    schema = schemathesis.openapi.from_url(url + "/openapi.json")
    for operation in schema.get_all_operations():

        @settings(
            max_examples=15,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.ok().as_strategy())
        def fuzz(case):
            response = case.call()
            assert response.status_code < 500, response.text

        fuzz()


# ---- API key, other sites, page, statistics ----


def test_api_key_protects_all_but_page_and_health(service, golden_tokenizer, tiny):
    with scripted(tiny, golden_tokenizer, [1, 2], api_key="s3cret ü") as (url, service, engine):
        for path in ("/", "/health"):
            assert httpx.get(url + path).status_code == 200
        for path in ("/stats", "/metrics", "/v1/models", "/openapi.json", "/nothing"):
            assert httpx.get(url + path).status_code == 401
        assert ask(url).json()["error"]["message"].startswith("an API key is needed")
        for key in (b"s3cret", b"Bearer s3cret", b"Bearer", b"bearer \xff", b"Basic s3cret"):
            response = ask(url, headers={b"Authorization": key})
            assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
        assert "wrong" in response.json()["error"]["message"]
        assert ask(url, headers={b"Authorization": "Bearer s3cret ü".encode()}).status_code == 200


def test_cors_allows_only_named_origins(url, tiny, golden_tokenizer):
    preflight = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    response = httpx.options(url + "/chat/completions", headers=preflight)
    assert response.status_code == 405 and not [name for name in response.headers if "access-control" in name]
    with scripted(tiny, golden_tokenizer, [1], origins=["https://a.example"], api_key="key") as (url, *_):
        allowed = "access-control-allow-origin"
        assert httpx.options(url + "/chat/completions", headers=preflight).headers[allowed] == "https://a.example"
        assert ask(url, headers={"Origin": "https://a.example"}).headers[allowed] == "https://a.example"  # a 401 too
        assert allowed not in ask(url, headers={"Origin": "https://b.example"}).headers


@pytest.mark.slow
def test_host_header_of_other_sites_is_refused(tiny, golden_tokenizer):
    with scripted(tiny, golden_tokenizer, [1] * 9, hosts=["localhost", "chat.example"]) as (url, *_):
        for host in ("localhost:8000", "LOCALHOST", "127.0.0.1", "10.1.2.3:80", "[::1]:8000", "chat.example"):
            assert ask(url, headers={"Host": host}).status_code == 200
        for host in ("evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "[x", "a@evil.example"):
            response = ask(url, headers={"Host": host})
            assert response.status_code == 403 and "or localhost, chat.example" in response.text


def test_head_returns_the_headers_of_get(url):
    for path in ("/", "/health"):
        head, get = httpx.head(url + path), httpx.get(url + path)
        assert head.status_code == 200 and not head.content
        assert head.headers["content-length"] == get.headers["content-length"]


def test_page_policy_allows_only_its_own_script(url):
    response = httpx.get(url)
    assert response.status_code == 200 and "<title>nanochat" in response.text
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'; script-src 'sha256-" in policy and "connect-src 'self'" in policy
    assert response.headers["x-content-type-options"] == "nosniff"


def test_stats_health_and_metrics_count_a_request(url, service):
    before = httpx.get(url + "/stats").json()
    ask(url, temperature=0)
    after = httpx.get(url + "/stats").json()
    assert after["answers"]["length"] == before["answers"]["length"] + 1
    assert after["tokens"] == before["tokens"] + 8 and after["prompt_tokens"] > before["prompt_tokens"]
    assert (after["slots"], after["waiting"], len(after["devices"])) == (8, 0, 2)
    assert httpx.get(url + "/health").json() == {"status": "ok", "ready": True}
    lines = httpx.get(url + "/metrics").text.splitlines()
    assert f'nanochat_tokens_total{{model="sft",gpu="0"}} {after["devices"][0]["tokens"]}' in lines
    names = {line.split()[2] for line in lines if line.startswith("# TYPE ")}
    assert names == {re.split(r"[ {]", line)[0] for line in lines if not line.startswith("#")}
    assert all(re.fullmatch(r'[a-z_]+(\{[a-z]+="\w+"(,[a-z]+="\w+")*\})? [\d.e+]+', li) for li in lines if li[0] != "#")


# ---- slots and queue entries ----


@contextlib.contextmanager
def connection(url):
    with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=20) as sock:
        yield sock


def post(body, path="/chat/completions", headers=""):
    data = json.dumps({"messages": HELLO, **body}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{headers}"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


@pytest.mark.slow
@pytest.mark.parametrize("abruptly", [False, True])
@pytest.mark.parametrize("path, stream", [("/chat/completions", {}), ("/v1/chat/completions", {"stream": False})])
def test_disconnect_frees_slot_and_queue_entry(tiny, golden_tokenizer, path, stream, abruptly):
    with scripted(tiny, golden_tokenizer, [65] * 90, gated=True) as (url, service, engine):
        with connection(url) as first, connection(url) as second:
            first.sendall(post(stream, path))
            wait_until(lambda: service.stats()["running"] == 1)
            engine.permits.release(3)
            second.sendall(post(stream, path))
            wait_until(lambda: service.stats()["waiting"] == 1)
            if abruptly:
                first.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                second.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            second.close()
            wait_until(lambda: service.stats()["waiting"] == 0)
            first.close()
        wait_until(lambda: service.stats()["answers"]["cancelled"] == 2)
        engine.permits.release(1)  # the engine's current step
        wait_until(lambda: service.stats()["running"] == 0 and not engine.is_busy)
        assert not service.handles and not service.models["sft"].queue.running
        engine.permits.release(1000)
        assert ask(url).status_code == 200


def test_full_queue_returns_429_with_retry_after(tiny, golden_tokenizer):
    with scripted(tiny, golden_tokenizer, [65] * 5, queue_size=2, gated=True) as (url, service, engine):
        with ThreadPoolExecutor(3) as pool:
            served = [pool.submit(ask, url, temperature=0) for _ in range(3)]
            wait_until(lambda: (service.stats()["running"], service.stats()["waiting"]) == (1, 2))
            refused = [ask(url), ask(url, path="/v1/chat/completions", stream=True)]
            too_many = ask(url, path="/v1/chat/completions", n=4)
            engine.permits.release(1000)
            assert len({text_of(response.result()) for response in served}) == 1
        for response in refused:
            assert response.status_code == 429 and int(response.headers["retry-after"]) > 0
            assert "all 1 slots and 2 queue entries are taken" in response.json()["error"]["message"]
        assert too_many.status_code == 400 and "room for 3" in too_many.json()["error"]["message"]
        wait_until(lambda: service.stats()["answers"] == service.stats()["answers"] | {"stop": 3, "refused": 2})


@pytest.mark.slow
def test_fair_queue_does_not_starve_light_clients(tiny, golden_tokenizer):
    def ask_from(address):
        return ask(url, headers={"X-Forwarded-For": address}).status_code  # as a proxy on this machine sends it

    order = []
    with scripted(tiny, golden_tokenizer, [65] * 5, queue_size=6, gated=True) as (url, service, engine):
        service.log = lambda handle: order.append(handle.client)
        with ThreadPoolExecutor(9) as pool:
            heavy, light = [], []
            for i in range(7):  # one runs, six wait: the queue is full
                heavy.append(pool.submit(ask_from, "10.0.0.1"))
                wait_until(lambda i=i: service.stats()["running"] + service.stats()["waiting"] == i + 1)
            for i in range(2):
                light.append(pool.submit(ask_from, "10.0.0.2"))
                wait_until(lambda i=i: len(order) == i + 1)
            engine.permits.release(1000)
        assert [response.result() for response in heavy] == [200] * 5 + [429] * 2  # evicted for the other client
        assert [response.result() for response in light] == [200] * 2
    assert order == ["10.0.0.1"] * 2 + ["10.0.0.1", "10.0.0.1", "10.0.0.2", "10.0.0.1", "10.0.0.2", *["10.0.0.1"] * 2]


@pytest.mark.slow
def test_forty_clients_of_all_kinds_leave_no_slot_or_queue_entry_taken(tiny, golden_tokenizer):
    """Streams, several completions, invalid bodies, and clients that leave, more than there is room for."""
    model = ServedModel("sft", golden_tokenizer, tiny.config, [lambda: tiny_engine(tiny, golden_tokenizer)], 12)
    service = Service([model])

    def client(i):
        headers = {"X-Forwarded-For": f"10.0.0.{i % 7}"}
        if i % 5 == 0:
            return ask(url, headers=headers, max_tokens=5 + i)
        if i % 5 == 1:
            options = {"n": 1 + i % 4, "stream": True, "stop": ["e", "an"], "max_tokens": 40}
            return ask(url, path="/v1/chat/completions", headers=headers, **options)
        if i % 5 == 2:
            return ask(url, headers=headers, temperature=-1)
        with connection(url) as sock:
            sock.sendall(post({"max_tokens": 200}, headers=f"X-Forwarded-For: 10.0.0.{i % 7}\r\n"))
            if i % 2:
                sock.recv(100)
            if i % 3:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)

    with serving(service) as url:
        with ThreadPoolExecutor(40) as pool:
            responses = [response for response in pool.map(client, range(40)) if response]
        assert {200, 400} <= {response.status_code for response in responses} <= {200, 400, 429}
        for response in responses:
            if response.status_code == 200:
                last = events(response)[-1]
                assert last == "[DONE]" or "done" in last or "this request was removed" in last["error"]
        wait_until(lambda: not service.stats()["running"] + service.stats()["waiting"])
        wait_until(lambda: not service.handles)
        assert not model.queue.running and not model.threads[0].engine.is_busy
        assert service.stats()["answers"]["failed"] == 0
        assert ask(url).status_code == 200


def test_failed_engine_is_replaced_and_its_requests_fail(tiny, golden_tokenizer, capfd):
    with scripted(tiny, golden_tokenizer, [65] * 90, max_slots=2, gated=True) as (url, service, engine):
        with ThreadPoolExecutor(1) as pool:
            streamed = pool.submit(ask, url)
            wait_until(lambda: service.stats()["running"] == 1)
            engine.permits.release(3)
            wait_until(lambda: service.stats()["tokens"] == 3)
            replacement = ScriptedEngine(tiny, golden_tokenizer, 2, engine.script)
            service.threads[0].make_engine = lambda: replacement
            engine.script = None
            engine.permits.release(1)
            *tokens, last = events(streamed.result())
        assert len(tokens) == 3 and last["error"].startswith("the engine failed (TypeError): try again")
        wait_until(lambda: service.status == "ok")
        assert events(ask(url))[-1]["done"] and service.stats()["answers"]["failed"] == 1
        service.threads[0].make_engine = None  # no engine can be made any more
        service.threads[0].engine.script = None
        response = ask(url, path="/v1/chat/completions")
        assert response.status_code == 500 and "the engine failed" in response.json()["error"]["message"]
        wait_until(lambda: service.status == "failed")
        assert httpx.get(url + "/health").status_code == 503 and ask(url).status_code == 503
    assert "TypeError" in capfd.readouterr().err


# ---- the program ----


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    """A base folder with a tokenizer and, as two stages, a model that always generates max_tokens when greedy."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = Tokenizer.load(GOLDEN / "tokenizer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        for stage in ("sft", "rl"):
            save_checkpoint(tiny_gpt(initial=True, sequence_len=2048), stage, "tiny", tokenizer=tokenizer)
        yield folder


@contextlib.contextmanager
def program(base_folder, *flags):
    """Runs chat_web in a process; yields it and its URL once it is ready."""
    command = [sys.executable, "-m", "scripts.chat_web", "--device", "cpu", "--no-compile", "--port", "0", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            lines = []
            while not (found := re.search(r"http://[\d.]+:\d+", "".join(lines))):
                lines.append(process.stdout.readline())
                assert lines[-1], "".join(lines)
            process.output = "".join(lines)
            assert httpx.get(found[0] + "/health").status_code == 200  # the address is printed when it works
            yield process, found[0]
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_program_finishes_running_completions_after_sigterm(base_folder):
    """After SIGTERM curl receives the rest of its response, later requests get 503, and the log has no text."""
    with program(base_folder, "-i", "sft,rl") as (process, url):
        body = json.dumps({"messages": [{"role": "user", "content": "swordfish"}], "max_tokens": 600, "temperature": 0})
        curl = ["curl", "-sN", "--noproxy", "*", url + "/chat/completions", "-H", "Content-Type: application/json"]
        with subprocess.Popen([*curl, "-d", body], stdout=subprocess.PIPE, text=True) as curl_process:
            received = curl_process.stdout.readline()
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: httpx.get(url + "/health").json() == {"status": "stopping", "ready": False})
            late = ask(url)
            received += curl_process.stdout.read()
        assert late.status_code == 503 and int(late.headers["retry-after"]) > 0
        assert json.loads(received.strip().split("\n\n")[-1][6:])["tokens"] == 600
        assert process.wait(20) == 0
        log = process.output + process.stdout.read()
    assert "stopping after the running completions" in log and "tokens, first after" in log
    assert "error" not in log.lower()
    assert "swordfish" not in log and json.loads(received.split("\n")[0][6:])["token"] not in log.split("stopping")[1]


@pytest.mark.slow
def test_program_stops_at_once_on_second_signal_and_logs_text_on_request(base_folder):
    with program(base_folder, "--log-text", "-m", "4") as (process, url):
        assert text_of(ask(url, [{"role": "user", "content": "sword\nfish"}]))
        with connection(url) as sock:
            sock.sendall(post({"max_tokens": 4096, "temperature": 0}))
            assert sock.recv(10)
            process.send_signal(signal.SIGINT)
            wait_until(lambda: httpx.get(url + "/health").status_code == 503)
            process.send_signal(signal.SIGINT)
            assert process.wait(10) == 0
            rest = b"".join(iter(lambda: sock.recv(2**16), b""))
        assert b"the server shut down" in rest
        log = process.stdout.read()
    assert "<|user_start|>sword\\nfish<|user_end|>" in log and "Traceback" not in log


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (["--port", "TAKEN"], "cannot listen on .* choose another --host or --port"),
        (["--host", "192.0.2.1"], "cannot listen on 192.0.2.1 port .* choose another --host or --port"),
        (["-i", "sft,sft"], "name each model only once"),
        (["--api-key", "schlüssel"], "only ASCII letters"),
        (["--cors-origin", "https://a.example,b.example"], "write sites as https://chat.example"),
        (["--cors-origin", "https://a.example/"], "without a path"),
        (["-i", "sft,raw"], "unknown stage 'raw'"),
        (["-i", "mid"], "no checkpoint in .* scripts.mid_train"),
        (["-g", "other"], "there are tiny"),
        (["-s", "7"], "no checkpoint of step 7"),
    ],
)
def test_program_reports_invalid_flags_in_one_line(base_folder, monkeypatch, flags, complaint):
    monkeypatch.setattr(chat_web.checkpoint_manager, "load_model", None)  # flags are checked before models are loaded
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        flags = [port if flag == "TAKEN" else flag for flag in flags]
        with pytest.raises(SystemExit, match=complaint) as exit:
            chat_web.main(["--device", "cpu", *([] if "--port" in flags else ["--port", "0"]), *flags])
    assert str(exit.value).startswith("error: ") and "\n" not in str(exit.value)


def test_models_with_different_tokenizers_are_served_side_by_side(base_folder, tmp_path, monkeypatch, golden_tokenizer):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    other = Tokenizer.train(["so it is said " * 50], vocab_size=267)
    save_checkpoint(tiny_gpt(), "sft", "first", tokenizer=golden_tokenizer)
    save_checkpoint(tiny_gpt(vocab_size=267), "sft", "second", tokenizer=other)
    flags = chat_web.Flags(source="sft/second,sft/first")
    second, first = chat_web.load_models(flags, [torch.device("cpu")])
    assert (second.name, second.tokenizer.vocab_size) == ("sft/second", 267)
    assert (first.name, first.tokenizer.fingerprint) == ("sft/first", golden_tokenizer.fingerprint)


@pytest.mark.parametrize("host, is_open", [("127.0.0.1", False), ("0.0.0.0", True)])
@pytest.mark.parametrize("key", ["", "key"])
def test_program_warns_of_open_address_without_key(base_folder, monkeypatch, capsys, host, is_open, key):
    monkeypatch.setattr(chat_web.Server, "run", lambda self, sockets: sockets[0].close())
    monkeypatch.setenv("NANOCHAT_API_KEY", key)
    chat_web.main(["--device", "cpu", "--port", "0", "--host", host])
    assert ("warning: " in capsys.readouterr().out) == (is_open and not key)
