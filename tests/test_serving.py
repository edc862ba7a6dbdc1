"""
Fair turns, bounds and shares of the queue before the engines; engines together serve what one would.

    python -m pytest tests/test_serving.py
"""

import asyncio
import threading
from types import SimpleNamespace

import pytest
import torch

from nanochat.common import UserError
from nanochat.engine import Engine, Request
from nanochat.gpt import GPT, GPTConfig
from nanochat.serve.scheduler import Busy, FairQueue, Job, Model, Service, Unavailable


def job(client):
    errors = []
    return Job(Request([1]), SimpleNamespace(client=client, fail=errors.append, errors=errors), 0)


def fill(queue, clients):
    """A job for each letter."""
    jobs = [job(client) for client in clients]
    for each in jobs:
        queue.put([each])
    return jobs


def opened(size, *slots):
    queue = FairQueue(size)
    for engine, num in enumerate(slots):
        queue.open(engine, num)
    return queue


def turns(clients, slots):
    """Clients in the order of their turns, when of the jobs that run always the first one ends."""
    queue = opened(100, slots)
    fill(queue, clients)
    held, taken = [], ""
    while queue.num_waiting:
        new = queue.take(0, len(held))
        taken += "".join(each.stream.client for each in new)
        held += new
        queue.done(held.pop(0))
    return taken


@pytest.mark.parametrize(
    "clients, slots, expected",
    [
        ("aaaa", 1, "aaaa"),
        ("aaaab", 1, "abaaa"),
        ("aaaabbc", 1, "abcabaa"),
        ("aaaab", 2, "abaaa"),
        ("aaaabbbb", 4, "abababab"),  # as many of the one run as of the other
        ("abcabc", 2, "abcabc"),
    ],
)
def test_turns(clients, slots, expected):
    assert turns(clients, slots) == expected


def test_the_queue_is_bounded_and_makes_room_for_those_with_less():
    queue = opened(4, 1)
    mine = fill(queue, "aaaaa")
    with pytest.raises(Busy, match="all 1 slots and 4 places"):
        queue.put([job("a")])
    fill(queue, "b")
    assert [len(each.stream.errors) for each in mine] == [0, 0, 0, 0, 1] and queue.num_waiting == 5
    with pytest.raises(Busy):
        queue.put([job("b"), job("b"), job("b")])  # would have more than the other
    assert queue.num_waiting == 5
    with pytest.raises(Busy):
        FairQueue(0).put([job("a")])


def test_who_leaves_the_queue_leaves_nothing():
    queue = opened(4, 1)
    first, second = fill(queue, "ab")
    queue.remove(first)
    queue.remove(first)
    assert queue.take(0, 0) == [second] and not queue.waiting
    queue.done(second)
    assert not queue.running
    queue.close()
    assert queue.take(0, 0) is None


def test_engines_share_what_there_is():
    queue = opened(100, 4, 4)
    fill(queue, "aaaaaa")
    assert len(queue.take(0, 0)) == 3 and queue.take(0, 3) == []
    assert len(queue.take(1, 0)) == 3
    fill(queue, "a" * 10)
    assert len(queue.take(1, 3)) == 1 and queue.take(1, 4) == []  # no more than it has slots
    queue.open(1, 0)  # it has failed
    assert len(queue.take(0, 3)) == 1 and queue.capacity == 104


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return GPT.create(GPTConfig(64, 1024, n_layer=1, n_head=2, n_kv_head=1, n_embd=32))


def test_two_engines_say_what_one_says(tiny, golden_tokenizer):
    requests = [Request([1 + i, 2], 10, seed=i) for i in range(20)]
    expected = [completion.tokens for completion in Engine(tiny, golden_tokenizer).generate(requests)]

    async def hear(stream):
        pieces = [piece async for batch in stream.batches() for piece in batch]
        stream.close()
        return [piece.token for piece in pieces if piece.token is not None], {piece.device for piece in pieces}

    async def main():
        service.start()
        while service.status == "loading":
            await asyncio.sleep(0.01)
        streams = [service.submit("m", [request], "client") for request in requests]
        heard = await asyncio.gather(*map(hear, streams))
        with pytest.raises(UserError, match="max_tokens 0"):
            service.submit("m", [Request([1], 0)], "client")
        await service.stop(1)
        with pytest.raises(Unavailable, match="the server stops"):
            service.submit("m", requests, "client")
        service.close()
        return heard

    makers = [lambda: Engine(tiny, golden_tokenizer, 3)] * 2
    service = Service({"m": Model(golden_tokenizer, tiny.config, makers, 100)})
    heard = asyncio.run(main())
    assert [tokens for tokens, _ in heard] == expected
    assert all(len(devices) == 1 for _, devices in heard) and {0, 1} == set().union(*(devices for _, devices in heard))
    stats = service.stats()
    assert stats["tokens"] == sum(map(len, expected)) == sum(device["tokens"] for device in stats["devices"])
    assert not any("engine" in thread.name for thread in threading.enumerate())
