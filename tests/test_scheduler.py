"""
The scheduler: order, bounds and sharing of the queue, and two engines behind one queue.

    python -m pytest tests/test_scheduler.py
"""

import asyncio
import threading
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from factories import tiny_engine, tiny_gpt

from nanochat.common import UserError
from nanochat.engine import Engine
from nanochat.request import Request
from nanochat.serve.scheduler import (
    EngineThread,
    FairQueue,
    Generation,
    GenerationFailed,
    QueueFull,
    ResponseHandle,
    ServedModel,
    Service,
    Unavailable,
)
from scripts.chat_web import make_engine


def generation(client):
    return Generation(Request([1]), SimpleNamespace(client=client))


def fill(queue, clients):
    """Puts one generation per letter into the queue, one at a time."""
    generations = [generation(client) for client in clients]
    for each in generations:
        queue.put([each])
    return generations


def queue_of(size, *slots):
    """A queue with one ready engine for each number of slots."""
    queue = FairQueue(size)
    for engine, num_slots in enumerate(slots):
        queue.set_slots(engine, num_slots)
    return queue


def clients_in_order(clients, slots):
    """The clients in the order in which the queue serves them if the oldest running generation always ends first."""
    queue = queue_of(100, slots)
    fill(queue, clients)
    running, order = [], ""
    while queue.waiting:
        taken = queue.take(0, len(running))
        order += "".join(each.client for each in taken)
        running += taken
        queue.release(running.pop(0))
    return order


@pytest.mark.parametrize(
    "clients, slots, expected",
    [
        ("aaaa", 1, "aaaa"),
        ("aaaab", 1, "abaaa"),
        ("aaaabbc", 1, "abcabaa"),
        ("aaaab", 2, "abaaa"),
        ("aaaabbbb", 4, "abababab"),  # equally many of both
        ("abcabc", 2, "abcabc"),
    ],
)
def test_fair_queue_serves_clients_in_turn(clients, slots, expected):
    assert clients_in_order(clients, slots) == expected


def test_fair_queue_when_full_evicts_the_newest_of_the_heaviest_client():
    queue = queue_of(4, 1)
    heavy = fill(queue, "aaaaa")
    with pytest.raises(QueueFull, match="all 1 slots and 4 queue entries are taken"):
        queue.put([generation("a")])
    assert queue.put([generation("b")]) == [heavy[-1]]
    assert len(queue.waiting) == 5
    with pytest.raises(QueueFull):
        queue.put([generation("b"), generation("b"), generation("b")])  # would have more than the other
    assert len(queue.waiting) == 5
    with pytest.raises(QueueFull):
        FairQueue(0).put([generation("a")])


def test_fair_queue_remove_leaves_no_trace():
    queue = queue_of(4, 1)
    first, second = fill(queue, "ab")
    queue.remove(first)
    queue.remove(first)
    assert queue.take(0, 0) == [second] and not queue.waiting
    queue.release(second)
    assert not queue.running
    queue.close()
    assert queue.take(0, 0) is None


def test_fair_queue_shares_the_load_among_engines():
    queue = queue_of(100, 4, 4)
    fill(queue, "aaaaaa")
    assert len(queue.take(0, 0)) == 3 and queue.take(0, 3) == []
    assert len(queue.take(1, 0)) == 3
    fill(queue, "a" * 10)
    assert len(queue.take(1, 3)) == 1 and queue.take(1, 4) == []  # no more than it has slots
    queue.set_slots(1, 0)  # it has failed
    assert len(queue.take(0, 3)) == 1 and queue.capacity == 104


def test_updates_yield_the_tokens_before_a_failure():
    async def main():
        handle = ResponseHandle(SimpleNamespace(), SimpleNamespace(queue=queue_of(1, 1)), [Request([1])], client="a")
        (response,) = handle.generations
        handle.deliver(response, [5], [-0.5], "")
        handle.fail(GenerationFailed("the engine failed"))
        seen = []
        with pytest.raises(GenerationFailed, match="the engine failed"):
            async for _ in handle.updates():
                seen.append(list(response.tokens))
        response.stop("failed")
        handle.deliver(response, [6], [-0.5], "length")  # from the step during which it was stopped
        assert seen == [[5]] and (response.tokens, response.finish) == ([5], "failed")

    asyncio.run(main())


@pytest.mark.parametrize("with_logprobs", [False, True])
def test_engine_thread_copies_each_new_token_once(golden_tokenizer, with_logprobs):
    requests = [Request([1, 2], 9, seed=3, logprobs=with_logprobs), Request([2], 5, logprobs=with_logprobs)]
    engine = tiny_engine(tiny_gpt(n_layer=1), golden_tokenizer)
    expected = engine.generate(requests)
    thread = EngineThread(0, queue_of(9, 2), lambda: engine)
    thread.engine = engine
    generations = [Generation(request, SimpleNamespace(client="a")) for request in requests]
    thread.queue.put(generations)
    for each in thread.queue.take(0, 0):
        thread.generations[engine.add(each.request)] = each
    received = {each: ([], [], []) for each in generations}
    while thread.generations:
        for each, *results in thread._step():
            for have, new in zip(received[each], results, strict=True):
                have.extend([new] if isinstance(new, str) else new)
    for each, completion in zip(generations, expected, strict=True):
        tokens, logprobs, finishes = received[each]
        assert (tokens, logprobs) == (completion.tokens, completion.logprobs)
        assert "".join(finishes) == completion.finish == "length"
    assert not thread.queue.running


def test_ended_conversation_is_read_ahead_while_the_engine_is_idle(golden_tokenizer):
    engine = tiny_engine(tiny_gpt(n_layer=1), golden_tokenizer)
    thread = EngineThread(0, queue_of(9, 2), lambda: engine)
    thread.engine = engine
    requests = [Request([1, 2], 3), Request([3, 4], 4)]
    thread.queue.put([Generation(request, SimpleNamespace(client="a")) for request in requests])
    for each in thread.queue.take(0, 0):
        thread.generations[engine.add(each.request)] = each
    for num_tokens in (0, 0, 0, 2 + 4 + 1):  # the first one ends while the second one continues
        thread._step()
        thread._read_ahead()
        assert thread.stats(1)["cached_prefix_tokens"] == num_tokens


def test_stats_report_the_memory_of_cached_prefixes(golden_tokenizer):
    engine = tiny_engine(tiny_gpt(n_layer=1), golden_tokenizer)
    engine.prefixes.chunk_size = 8
    thread = EngineThread(0, queue_of(9, 2), lambda: engine)
    thread.engine = engine
    assert thread.stats(1)["prefix_cache_bytes"] == 0
    engine.add(Request(list(range(20)), 1))
    while engine.is_busy:
        engine.step()
    thread._read_ahead()
    stats = thread.stats(1)
    assert stats["cached_prefix_tokens"] == engine.prefixes.num_tokens >= 8
    assert stats["prefix_cache_bytes"] == engine.prefixes.num_bytes > 0


async def collect(handle):
    """The tokens of a response with one generation, and the index of the engine that generated them."""
    async for _ in handle.updates():
        pass
    handle.close()
    (generation,) = handle.generations
    return generation.tokens, generation.engine_index


def test_service_with_two_engines_generates_what_one_engine_does(golden_tokenizer):
    model = tiny_gpt(n_layer=1, initial=True)
    requests = [Request([1 + i, 2], 10, seed=i) for i in range(20)]
    expected = [completion.tokens for completion in Engine(model, golden_tokenizer).generate(requests)]

    async def main():
        service.start()
        served = service.models["m"]
        while service.status == "loading":
            await asyncio.sleep(0.01)
        handles = [service.submit(served, [request], "client") for request in requests]
        results = await asyncio.gather(*map(collect, handles))
        with pytest.raises(UserError, match="max_tokens 0"):
            service.submit(served, [Request([1], 0)], "client")
        await service.stop(1)
        with pytest.raises(Unavailable, match="the server is shutting down"):
            service.submit(served, requests, "client")
        service.close()
        return results

    make_engines = [lambda: Engine(model, golden_tokenizer, 3)] * 2
    service = Service([ServedModel("m", golden_tokenizer, model.config, make_engines=make_engines, queue_size=100)])
    results = asyncio.run(main())
    assert [tokens for tokens, _ in results] == expected
    assert {index for _, index in results} == {0, 1}
    stats = service.stats()
    assert stats["tokens"] == sum(map(len, expected)) == sum(device["tokens"] for device in stats["devices"])
    assert not any("engine" in thread.name for thread in threading.enumerate())


@pytest.mark.gpu
@pytest.mark.parametrize("num_models, num_devices", [(1, 2), (2, 1), (2, 2)])
def test_engines_of_one_process_capture_their_graphs_at_the_same_time(num_models, num_devices, golden_tokenizer):
    """All engines start together, and each request after that may need another graph."""
    if torch.cuda.device_count() < num_devices:
        pytest.skip(f"needs {num_devices} GPUs")

    def make(model):
        engine = make_engine(model, golden_tokenizer, max_slots=4)
        engine.stop_tokens = set()
        return engine

    async def main():
        service.start()
        while any(thread.state == "loading" for thread in service.threads):
            await asyncio.sleep(0.01)
        assert [thread.state for thread in service.threads] == ["ready"] * num_models * num_devices
        handles = [
            service.submit(service.models[f"m{i % num_models}"], [request], "client")
            for i, request in enumerate(requests)
        ]
        results = await asyncio.gather(*map(collect, handles))
        service.close()
        return results

    requests = [Request([1 + i, 2], 5 + i % 7, top_k=(0, 5, 50)[i % 3], seed=i) for i in range(40)]
    models = []
    for i in range(num_models):
        makers = [partial(make, tiny_gpt(seed=i, device=f"cuda:{index}")) for index in range(num_devices)]
        models.append(ServedModel(f"m{i}", golden_tokenizer, tiny_gpt().config, makers, queue_size=100))
    service = Service(models)
    results = asyncio.run(main())
    assert [len(tokens) for tokens, _ in results] == [request.max_tokens for request in requests]
    assert service.outcomes["length"] == len(requests)
    assert {index for _, index in results} == set(range(num_devices))
