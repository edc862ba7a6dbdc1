"""
The load test: it detects what a faulty server does, and runs at toy size against the real one.

    python -m pytest tests/test_bench_serve.py
"""

import asyncio
import json

import pytest

from scripts.bench import serve as bench_serve
from scripts.bench.load_client import LoadClient, summarize

QUESTIONS = [f"question {i}" for i in range(6)]
OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
BUSY = b'HTTP/1.1 429 Too Many Requests\r\nRetry-After: 1\r\n\r\n{"error": {"message": "full"}}'


def tokens_of(question):
    return [f"{question} ", "has ", "this ", "answer"]


def event(**content):
    return b"data: " + json.dumps(content).encode() + b"\n\n"


# Servers: each yields the pieces of a response; `number` counts the requests before this one.


async def correct(question, number):
    yield OK
    for token in tokens_of(question):
        yield event(token=token, gpu=0)
        await asyncio.sleep(0)
    yield event(done=True, finish_reason="length", tokens=4, prompt_tokens=9, dropped=0)


async def mixing_up(question, number):
    async for piece in correct(question if number < 12 else question.replace("3", "4"), number):
        yield piece


async def losing_a_token(question, number):
    async for piece in correct(question, number):
        if number != 8 or b"this" not in piece:
            yield piece


async def cutting_off(question, number):
    async for piece in correct(question, number):
        if number != 8 or b"done" not in piece:
            yield piece


async def failing(question, number):
    async for piece in correct(question, number):
        yield event(error="no memory") if number == 8 and b"done" in piece else piece


async def refusing(question, number):
    if number >= 8:
        yield BUSY
    else:
        async for piece in correct(question, number):
            yield piece


async def refusing_without_retry_after(question, number):
    async for piece in refusing(question, number):
        yield piece.replace(b"Retry-After: 1\r\n", b"")


async def crashing(question, number):
    if number >= 8:
        yield b"HTTP/1.1 500 Internal Server Error\r\n\r\nsorry"
    else:
        async for piece in correct(question, number):
            yield piece


async def grouping_tokens(question, number):
    """Sends all tokens in one event, which is equivalent."""
    pieces = [piece async for piece in correct(question, number)]
    if number >= 6:
        yield pieces[0] + event(token="".join(tokens_of(question)), gpu=0) + pieces[-1]
    else:
        yield b"".join(pieces)


async def run_load(serve, may_refuse=False):
    """Runs all kinds of load against such a server; returns the outcomes of each, the problems and the summary."""
    num_requests = 0

    async def handle(reader, writer):
        nonlocal num_requests
        head = await reader.readuntil(b"\r\n\r\n")
        body = json.loads(await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split()[0])))
        number = num_requests
        num_requests += 1
        try:
            async for piece in serve(body["messages"][-1]["content"], number):
                writer.write(piece)
                await writer.drain()
        except ConnectionError:
            pass  # the client disconnected
        finally:
            writer.close()

    async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
        client = LoadClient(server.sockets[0].getsockname()[1], QUESTIONS, 4)
        sequential = client.check(await client.sequential())
        responses = await client.concurrent(12)
        concurrent = client.check(responses, may_refuse)
        disconnecting = client.check(await client.disconnecting(32), may_refuse)
    return sequential, concurrent, disconnecting, client.problems, summarize(responses, 1.0)


def outcomes(answered=0, refused=0, left=0, wrong=0):
    return {"answered": answered, "refused": refused, "left": left, "wrong": wrong}


@pytest.mark.parametrize("serve", [correct, grouping_tokens])
def test_load_client_accepts_a_correct_server(serve):
    sequential, concurrent, disconnecting, problems, summary = asyncio.run(run_load(serve))
    assert (sequential, concurrent, problems) == (outcomes(6), outcomes(12), {})
    assert disconnecting["left"] >= 4  # a quarter disconnects before any event
    assert disconnecting["left"] + disconnecting["answered"] == 32
    assert summary["tokens/s"] == 48
    assert 0 < summary["fairness"] <= 1


@pytest.mark.parametrize(
    "serve, num_wrong, problem",
    [
        (mixing_up, 1, "completion differs from that of the same request alone"),
        (losing_a_token, 1, "completion differs from that of the same request alone"),
        (cutting_off, 1, "HTTP 200, then {'token': 'answer', 'gpu': 0}"),
        (failing, 1, "HTTP 200, then {'error': 'no memory'}"),
        (refusing, 10, "HTTP 429, then {'error': {'message': 'full'}}"),
        (refusing_without_retry_after, 10, "HTTP 429, then {'error': {'message': 'full'}}"),
        (crashing, 10, "HTTP 500, then {'error': 'JSONDecodeError: Expecting value: line 1 column 1 (char 0)'}"),
    ],
)
def test_load_client_detects_a_faulty_server(serve, num_wrong, problem):
    sequential, concurrent, _, problems, _ = asyncio.run(run_load(serve))
    assert sequential == outcomes(6)
    assert concurrent["wrong"] >= num_wrong
    assert list(problems)[0] == problem


def test_load_client_accepts_refusals_only_with_retry_after():
    _, concurrent, _, problems, _ = asyncio.run(run_load(refusing, may_refuse=True))
    assert (concurrent, problems) == (outcomes(2, refused=10), {})
    _, concurrent, _, _, _ = asyncio.run(run_load(refusing_without_retry_after, may_refuse=True))
    assert concurrent == outcomes(2, wrong=10)


@pytest.mark.slow
def test_benchmark_at_toy_size_finds_no_problems(capsys):
    flags = ["--num-rows", "4", "--queue", "4", "--users", "8", "--crowd", "24"]
    flags += ["--vanish", "16", "--max-tokens", "12", "--rounds", "1", "--minutes", "0.01", "--device", "cpu"]
    ratios = bench_serve.main(flags)
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    results = report["results"]
    assert (report["ratios"], report["problems"]) == (ratios, {})
    assert results["alone"]["answered"] == results["together"]["answered"] == 8
    crowd = results["crowd"]
    assert crowd["answered"] >= 8 and crowd["refused"] > 0 and crowd["answered"] + crowd["refused"] == 24
    assert sum(results["vanish"][name] for name in ("answered", "refused", "left")) == 16
    assert sum(results["mix"][name] for name in ("answered", "refused", "left")) == 48


@pytest.mark.slow
def test_benchmark_reports_invalid_flags_in_one_line():
    for flags, message in [
        (["--users", "9", "--num-rows", "4", "--queue", "4"], "room for"),
        (["-i", "sft", "-g", "nothing"], "did not start"),
    ]:
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            bench_serve.main(flags)
