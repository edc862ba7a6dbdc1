"""
The load test: that it notices what a server does wrong, and a small run of it against the real one.

    python -m pytest tests/test_bench_serve.py
"""

import asyncio
import json

import pytest

from scripts.bench import serve as bench_serve
from scripts.bench.load_client import Crowd, summary

QUESTIONS = [f"question {i}" for i in range(6)]
OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
BUSY = b'HTTP/1.1 429 Too Many Requests\r\nRetry-After: 1\r\n\r\n{"error": {"message": "full"}}'


def tokens_of(question):
    return [f"{question} ", "has ", "this ", "answer"]


def event(**content):
    return b"data: " + json.dumps(content).encode() + b"\n\n"


async def due(question, asked):
    """What a good server sends, in pieces; `asked` counts the requests before this one."""
    yield OK
    for token in tokens_of(question):
        yield event(token=token, gpu=0)
        await asyncio.sleep(0)
    yield event(done=True, finish_reason="length", tokens=4, prompt_tokens=9, dropped=0)


async def mixed_up(question, asked):
    async for piece in due(question if asked < 12 else question.replace("3", "4"), asked):
        yield piece


async def one_token_lost(question, asked):
    async for piece in due(question, asked):
        if asked != 8 or b"this" not in piece:
            yield piece


async def cut_off(question, asked):
    async for piece in due(question, asked):
        if asked != 8 or b"done" not in piece:
            yield piece


async def failing(question, asked):
    async for piece in due(question, asked):
        yield event(error="no memory") if asked == 8 and b"done" in piece else piece


async def busy(question, asked):
    if asked >= 8:
        yield BUSY
    else:
        async for piece in due(question, asked):
            yield piece


async def curt(question, asked):
    """Does not say when to come back."""
    async for piece in busy(question, asked):
        yield piece.replace(b"Retry-After: 1\r\n", b"")


async def crashing(question, asked):
    if asked >= 8:
        yield b"HTTP/1.1 500 Internal Server Error\r\n\r\nsorry"
    else:
        async for piece in due(question, asked):
            yield piece


async def in_lumps(question, asked):
    """All tokens in one event: another way to send the same."""
    pieces = [piece async for piece in due(question, asked)]
    yield pieces[0] + event(token="".join(tokens_of(question)), gpu=0) + pieces[-1] if asked >= 6 else b"".join(pieces)


async def ask_all(serve, may_refuse=False):
    """The answers one by one and then at once, as judged, and the problems found."""
    asked = 0

    async def handle(reader, writer):
        nonlocal asked
        head = await reader.readuntil(b"\r\n\r\n")
        body = json.loads(await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split()[0])))
        number, asked = asked, asked + 1
        try:
            async for piece in serve(body["messages"][-1]["content"], number):
                writer.write(piece)
                await writer.drain()
        except ConnectionError:
            pass  # the client has left
        finally:
            writer.close()

    async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
        crowd = Crowd(server.sockets[0].getsockname()[1], QUESTIONS, 4)
        alone = crowd.judge(await crowd.one_by_one())
        together = await crowd.together(12)
        judged = crowd.judge(together, may_refuse)
        left = crowd.judge(await crowd.leaving(32), may_refuse)
    return alone, judged, left, crowd.problems, summary(together, 1.0)


def outcomes(answered=0, refused=0, left=0, wrong=0):
    return {"answered": answered, "refused": refused, "left": left, "wrong": wrong}


@pytest.mark.parametrize("serve", [due, in_lumps])
def test_a_good_server(serve):
    alone, together, left, problems, results = asyncio.run(ask_all(serve))
    assert (alone, together, problems) == (outcomes(6), outcomes(12), {})
    assert left["left"] >= 4 and left["left"] + left["answered"] == 32  # a quarter leaves at once
    assert results["tokens/s"] == 48
    assert 0 < results["fairness"] <= 1


@pytest.mark.parametrize(
    "serve, num_wrong, problem",
    [
        (mixed_up, 1, "another answer than alone"),
        (one_token_lost, 1, "another answer than alone"),
        (cut_off, 1, "HTTP 200, then {'token': 'answer', 'gpu': 0}"),
        (failing, 1, "HTTP 200, then {'error': 'no memory'}"),
        (busy, 10, "HTTP 429, then {'error': {'message': 'full'}}"),
        (curt, 10, "HTTP 429, then {'error': {'message': 'full'}}"),
        (crashing, 10, "HTTP 500, then {'error': 'JSONDecodeError: Expecting value: line 1 column 1 (char 0)'}"),
    ],
)
def test_what_a_server_does_wrong_is_noticed(serve, num_wrong, problem):
    alone, together, _, problems, _ = asyncio.run(ask_all(serve))
    assert alone == outcomes(6)
    assert together["wrong"] >= num_wrong
    assert list(problems)[0] == problem


def test_who_is_told_when_to_come_back_may_be_refused():
    _, together, _, problems, _ = asyncio.run(ask_all(busy, may_refuse=True))
    assert (together, problems) == (outcomes(2, refused=10), {})
    assert asyncio.run(ask_all(curt, may_refuse=True))[1] == outcomes(2, wrong=10)


def test_the_benchmark(capsys):
    flags = ["--num-rows", "4", "--queue", "4", "--users", "8", "--crowd", "40"]
    flags += ["--vanish", "16", "--max-tokens", "24", "--rounds", "1", "--minutes", "0.01", "--device", "cpu"]
    ratios = bench_serve.main(flags)
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    results = report["results"]
    assert (report["ratios"], report["problems"]) == (ratios, {})
    assert results["alone"]["answered"] == results["together"]["answered"] == 8
    crowd = results["crowd"]
    assert crowd["answered"] >= 8 and crowd["refused"] > 0 and crowd["answered"] + crowd["refused"] == 40
    assert sum(results["vanish"][name] for name in ("answered", "refused", "left")) == 16
    assert sum(results["mix"][name] for name in ("answered", "refused", "left")) == 64


def test_bad_flags_end_in_one_line():
    for flags, message in [
        (["--users", "0"], "at least 1"),
        (["--users", "9", "--num-rows", "4", "--queue", "4"], "room for"),
        (["-i", "sft", "-g", "nothing"], "did not start"),
    ]:
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            bench_serve.main(flags)
