"""
The engine: cached, chunked and batched generation against a full forward pass per token; requests that join, leave and
are cancelled at any time; tools; what it costs; bad input.

    python -m pytest tests/test_engine.py
"""

import random
from collections import Counter
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from conftest import golden
from factories import FAMILY

from nanochat import checkpoint_manager, engine
from nanochat.checkpoint_manager import find
from nanochat.common import UserError
from nanochat.engine import Completion, Engine, Request
from nanochat.gpt import GPT, GPTConfig

CPU = torch.device("cpu")
CONTEXT = 256  # its short window is 128
V = 1024  # of the golden tokenizer
CUE = 7  # what makes the talkative model talk


def make(vintage="modern", dtype=torch.float32, **changes):
    sizes = dict(n_layer=3, n_head=4, n_kv_head=2, n_embd=32, window_pattern="SL")
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(**{"sequence_len": CONTEXT, "vocab_size": V, **sizes, **FAMILY[vintage], **changes}), dtype=dtype
    )
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


@pytest.fixture(scope="module", params=FAMILY)
def model(request):
    return make(request.param)


@pytest.fixture(scope="module")
def modern():
    return make()


@pytest.fixture(scope="module")
def talkative(golden_tokenizer):
    """Likes sums, calls of the calculator and ends, and still listens to all that was said before."""
    model, (one, two, plus) = make(), (golden_tokenizer.encode(c)[0] for c in "12+")
    start, end, output_end, stop = (
        golden_tokenizer.special(f"<|{name}|>")
        for name in ("python_start", "python_end", "output_end", "assistant_end")
    )
    likely = {start: [one, two], one: [plus, end], two: [plus, end], plus: [one, two], end: [start], stop: [start]}
    likely |= {output_end: [start, stop, CUE], CUE: [start, one]}
    with torch.no_grad():
        for block in model.transformer.h:  # the last token counts most
            block.attn.c_proj.weight.mul_(0.1)
            block.mlp.c_proj.weight.mul_(0.02)
        model.resid_lambdas.fill_(1.0)
        model.x0_lambdas.fill_(0.2)
        model.lm_head.weight.mul_(0.3)
        for token, following in likely.items():
            model.lm_head.weight[following] += F.rms_norm(model.transformer.wte.weight[token], (32,)) / 4
    return model


def prompt_of(length, seed=0):
    return random.Random(f"{seed} {length}").choices(range(1000), k=length)


@torch.no_grad()
def naive_generate(model, prompt, num_tokens):
    """The slow reference: no cache, a forward pass over everything for each greedy token."""
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(int(model(torch.tensor([ids], device=model.device))[0, -1].argmax()))
    return ids[len(prompt) :]


@cache
def naive(model, length, num_tokens=12):
    return naive_generate(model, prompt_of(length), num_tokens)


def slow_probs(logits, request):
    """The distribution that a token is sampled from, step by step in float64: (V,)."""
    probs = (logits.double() / request.temperature).softmax(0)
    order = probs.argsort(descending=True)[: request.top_k or None].tolist()
    total, share, kept = float(probs[order].sum()), 0.0, []
    for token in order:
        if share < request.top_p:
            kept.append(token)
        share += float(probs[token]) / total
    cut = torch.zeros_like(probs)
    cut[kept] = probs[kept] / probs[kept].sum()
    return cut


def check_against_one_pass(model, request, completion):
    """
    By one forward pass over all that was said: greedy tokens are the likeliest after what precedes them, which makes
    them the naive generation's; sampled ones have the log-probabilities that were told; forced ones have 0.
    """
    said = completion.tokens + ([completion.end_token] if completion.finish == "stop" else [])
    ids = torch.tensor([[*request.prompt, *said]], device=model.device)
    with torch.no_grad():
        logits_TV = model(ids[:, :-1])[0, len(request.prompt) - 1 :].cpu()
    sampled = [*completion.sampled, True][: len(said)]
    assert len(completion.logprobs) == len(said) > 0
    for logits, token, logprob, is_sampled in zip(logits_TV, said, completion.logprobs, sampled, strict=True):
        if not is_sampled:
            expected = 0.0
        elif request.temperature:
            expected = slow_probs(logits, request)[token].log().item()
        else:
            assert token == logits.argmax()
            expected = logits.log_softmax(0)[token].item()
        assert abs(logprob - expected) < 1e-4


def assert_same(completion, expected):
    """Equal, but for the rounding of log-probabilities."""
    assert (completion.tokens, completion.sampled) == (expected.tokens, expected.sampled)
    assert (completion.finish, completion.end_token) == (expected.finish, expected.end_token)
    assert completion.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


def assert_nothing_left(it):
    assert not it.rows and not it.waiting and not it.needed and it.prefill is None
    assert list(it.prefixes) == [()]


def unstoppable(model, tokenizer, num_rows=32, **settings):
    """Random weights say special tokens too: here they end nothing."""
    it = Engine(model, tokenizer, num_rows, **settings)
    it.stop_tokens = set()
    return it


def greedy(prompt, max_tokens=12, **settings):
    return Request(prompt, max_tokens, temperature=0.0, **settings)


def run(it):
    """Steps to the end; the completions by number."""
    ended = {}
    while it.is_busy:
        ended |= {number: completion for number, token, completion in it.step() if token is None}
    return ended


# ---- against the naive reference ----


@pytest.mark.parametrize("chunk", [1, 3, 100, 512])
def test_prompts_of_all_lengths_together_equal_the_naive_generation(model, golden_tokenizer, monkeypatch, chunk):
    monkeypatch.setattr(engine, "PREFILL_CHUNK", chunk)
    lengths = [1, 2, 5, 127, 128, 129, 130, 200, CONTEXT - 12] if chunk > 1 else [1, 5, 140]
    requests = [greedy(prompt_of(length)) for length in lengths]
    completions = unstoppable(model, golden_tokenizer).generate([*requests, greedy(prompt_of(CONTEXT))])
    for length, completion in zip(lengths, completions, strict=False):
        assert completion.tokens == naive(model, length)
        assert completion.sampled == [True] * 12 and completion.finish == "length"
    assert completions[-1].tokens == naive(model, CONTEXT, 1) and completions[-1].finish == "context"


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("cast", [False, True], ids=["shared", "cast"])  # weights: a trainer's, used where they lie
@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
@pytest.mark.parametrize("vintage", FAMILY)
def test_every_layout_equals_the_full_forward_pass(vintage, n_kv_head, cast, num_rows, golden_tokenizer):
    model = make(vintage, n_kv_head=n_kv_head)
    if cast:
        model.cast_weights()
    mixed = [{"temperature": 0.0}, {"top_k": 5}, {"temperature": 0.0}, {"temperature": 1.5, "top_p": 0.8}, {}]
    requests = [
        Request(prompt_of(length), max_tokens, logprobs=True, **settings)
        for (length, max_tokens), settings in zip([(1, 9), (125, 12), (200, 3), (30, 5), (2, 7)], mixed, strict=True)
    ]
    completions = unstoppable(model, golden_tokenizer, num_rows).generate(requests)
    for request, completion in zip(requests, completions, strict=True):
        assert len(completion.tokens) == request.max_tokens
        check_against_one_pass(model, request, completion)


@pytest.mark.parametrize("cast", [False, True], ids=["shared", "cast"])
@pytest.mark.parametrize("chunk", [50, 512])
def test_rings_that_wrap_several_times(chunk, cast, golden_tokenizer, monkeypatch):
    monkeypatch.setattr(engine, "PREFILL_CHUNK", chunk)
    model = make(sequence_len=512)
    assert model.config.windows == [128, 512, 512]
    if cast:
        model.cast_weights()
    requests = [greedy(prompt_of(length), 600, logprobs=True) for length in (1, 300, 129)]
    completions = unstoppable(model, golden_tokenizer).generate(requests)
    for request, completion in zip(requests, completions, strict=True):
        assert len(completion.tokens) == 513 - len(request.prompt) and completion.finish == "context"
        check_against_one_pass(model, request, completion)


def test_every_window_full(golden_tokenizer):
    model = make(window_pattern="L")
    (completion,) = unstoppable(model, golden_tokenizer).generate([greedy(prompt_of(180))])
    assert completion.tokens == naive(model, 180)


def test_a_prompt_read_in_chunks_is_no_longer_in_memory_than_the_windows(modern, golden_tokenizer, monkeypatch):
    monkeypatch.setattr(engine, "PREFILL_CHUNK", 20)
    it = unstoppable(modern, golden_tokenizer)
    it.add(greedy(prompt_of(220)))
    while it.step() == []:
        if it.prefill:
            assert it.prefill.keys[0].size(1) == min(it.prefill.start, 128)
    assert [keys.size(1) for keys in it.decoder.keys] == [129, CONTEXT, CONTEXT]


@pytest.mark.parametrize("name", ["gpt/case0.pt", "gpt/case1.pt", "gpt/case2.pt"])  # in the repository: case1
@pytest.mark.parametrize("chunk", [33, 512])
def test_golden_greedy_tokens(name, chunk, golden_tokenizer, monkeypatch):
    case = torch.load(golden(name), weights_only=True)
    model = GPT(GPTConfig(**case["config"]))
    model.load_state_dict(case["state_dict"])
    monkeypatch.setattr(engine, "PREFILL_CHUNK", chunk)
    requests = [greedy(case["prompt"], len(case["greedy"])), greedy([3, 1, 4], 5)]
    assert unstoppable(model, golden_tokenizer).generate(requests)[0].tokens == case["greedy"]


def test_golden_classic_tokens(golden_tokenizer, monkeypatch):
    folder = golden("checkpoint/classic")
    expected = torch.load(folder / "expected.pt", weights_only=True)
    monkeypatch.setattr(checkpoint_manager, "stage_dir", lambda stage: folder.parent)
    model = find("base", "classic").build_model(CPU, torch.float32)
    (completion,) = unstoppable(model, golden_tokenizer).generate([greedy(expected["prompt"], len(expected["greedy"]))])
    assert completion.tokens == expected["greedy"]


# ---- rows come and go ----


def random_request(rng):
    return Request(
        [*prompt_of(rng.choice([0, 1, 9, 60, 150]), rng.randrange(2)), CUE],
        max_tokens=rng.randrange(1, 40),
        temperature=rng.choice([0.0, 0.7, 1.0]),
        top_k=rng.choice([0, 1, 5, 200, 5000]),
        top_p=rng.choice([1.0, 1.0, 0.4]),  # the last token within it is a likely one, so that rounding matters little
        seed=rng.randrange(3),
        logprobs=rng.random() < 0.5,
    )


@pytest.mark.parametrize("seed", range(3))
def test_a_text_does_not_depend_on_its_neighbours(talkative, golden_tokenizer, seed):
    rng = random.Random(seed)
    requests = [random_request(rng) for _ in range(12)]
    alone = [Engine(talkative, golden_tokenizer, 1).generate([request])[0] for request in requests]
    assert {"stop", "length"} <= {completion.finish for completion in alone}
    assert 0 < sum(not all(completion.sampled) for completion in alone) < 12  # tools in some rows
    for request, completion in zip(requests, alone, strict=True):
        if request.logprobs and request.top_k < V:
            check_against_one_pass(talkative, request, completion)
    for num_rows in (1, 3, 50):
        completions = Engine(talkative, golden_tokenizer, num_rows).generate(requests)
        for completion, expected in zip(completions, alone, strict=True):
            assert_same(completion, expected)


@pytest.mark.parametrize("seed", range(12))
def test_random_schedules_of_joining_and_leaving(talkative, golden_tokenizer, monkeypatch, seed):
    """Each that is not cancelled says what it says alone; one that is says nothing more; nothing stays behind."""
    rng = random.Random(seed)
    monkeypatch.setattr(engine, "PREFILL_CHUNK", rng.choice([1, 7, 64, 512]))
    monkeypatch.setattr(engine, "LENGTH_MULTIPLE", rng.choice([1, 16, 128]))  # slots grow under way
    it = Engine(talkative, golden_tokenizer, rng.randrange(1, 6))
    requests, said, ended, cancelled = {}, {}, {}, set()
    to_add = 14
    while to_add or it.is_busy:
        action = rng.random()
        if action < 0.15 and to_add:
            to_add -= 1
            request = random_request(rng)
            number = it.add(request)
            requests[number], said[number] = request, []
        elif action < 0.2 and requests:
            number = rng.choice(list(requests))  # under way, waiting, or over
            it.cancel(number)
            cancelled |= {number} - set(ended)
        else:
            for number, token, completion in it.step():
                assert number not in ended and number not in cancelled
                if token is None:
                    ended[number] = completion
                else:
                    said[number].append(token)
                    assert completion.tokens == said[number]
    assert set(requests) == set(ended) | cancelled
    assert_nothing_left(it)
    other = Engine(talkative, golden_tokenizer, 1)
    for number, completion in ended.items():
        assert_same(completion, other.generate([requests[number]])[0])


def test_the_stream_tells_of_every_token_and_every_end(modern, golden_tokenizer):
    requests = [greedy(prompt_of(4, seed), max_tokens) for seed, max_tokens in enumerate([5, 1, 3, 7])]
    it = unstoppable(modern, golden_tokenizer, num_rows=2)
    said = {i: [] for i in range(4)}
    ended = {}
    for index, token, completion in it.stream(requests):
        assert index not in ended
        if token is None:
            ended[index] = completion
        else:
            said[index].append(token)
            assert completion.tokens == said[index]
    assert [ended[i] for i in range(4)] == it.generate(requests)
    assert [len(said[i]) for i in range(4)] == [5, 1, 3, 7]


def test_slots_grow_while_texts_are_under_way(modern, golden_tokenizer):
    it = unstoppable(modern, golden_tokenizer)
    requests, ended = {}, {}
    for length, max_tokens in ((1, 60), (3, 40), (150, 20), (100, 156), (CONTEXT, 1)):
        request = greedy(prompt_of(length), max_tokens, logprobs=True)
        requests[it.add(request)] = request
        for _ in range(5):
            ended |= {number: completion for number, token, completion in it.step() if token is None}
    ended |= run(it)
    assert (it.decoder.num_slots, it.decoder.length) == (5, CONTEXT)
    for number, request in requests.items():
        check_against_one_pass(modern, request, ended[number])


def test_a_hundred_requests_in_three_rows(modern, golden_tokenizer):
    rng = random.Random(0)
    requests = [
        greedy(prompt_of(rng.randrange(1, 30), i), rng.randrange(1, 6), seed=i, logprobs=True) for i in range(100)
    ]
    it = unstoppable(modern, golden_tokenizer, num_rows=3)
    for request, completion in zip(requests, it.generate(requests), strict=True):
        assert len(completion.tokens) == request.max_tokens
        check_against_one_pass(modern, request, completion)
    assert it.decoder.num_slots == 3
    assert_nothing_left(it)


def test_a_slot_forgets_who_had_it(modern, golden_tokenizer):
    lengths = [150, 3, 140, 1]
    completions = unstoppable(modern, golden_tokenizer, num_rows=1).generate([greedy(prompt_of(n)) for n in lengths])
    assert [c.tokens for c in completions] == [naive(modern, n) for n in lengths]


def test_no_requests_no_completions(modern, golden_tokenizer):
    assert Engine(modern, golden_tokenizer).generate([]) == []


def test_the_callers_training_goes_on(modern, golden_tokenizer):
    unstoppable(modern, golden_tokenizer).generate([greedy([1, 2])])
    loss = modern(torch.tensor([[1, 2]]), torch.tensor([[2, 3]]))
    assert loss.requires_grad


# ---- cancelled ----


def test_cancelled_in_a_slot(modern, golden_tokenizer):
    it = unstoppable(modern, golden_tokenizer, num_rows=3)
    numbers = [it.add(greedy(prompt_of(length))) for length in (5, 140, 60, 2)]
    it.step()
    it.cancel(numbers[0])  # the last slot's text moves into its place
    it.cancel(numbers[0])
    it.cancel(99)
    ended = run(it)
    assert {number: ended[number].tokens for number in ended} == {
        numbers[i]: naive(modern, length) for i, length in ((1, 140), (2, 60), (3, 2))
    }
    assert_nothing_left(it)


@pytest.mark.parametrize("num_left", [0, 1])
def test_cancelled_while_its_prompt_is_read(modern, golden_tokenizer, monkeypatch, num_left):
    monkeypatch.setattr(engine, "PREFILL_CHUNK", 8)
    it = unstoppable(modern, golden_tokenizer)
    shapes = spy_on_prefills(it, monkeypatch)
    numbers = [it.add(greedy(prompt_of(length))) for length in (60, 30)]
    it.step()
    for number in numbers[num_left:]:
        it.cancel(number)
    if num_left == 0:
        assert not it.is_busy
        assert_nothing_left(it)
    ended = run(it)
    assert [completion.tokens for completion in ended.values()] == [naive(modern, 60)][:num_left]
    assert shapes == [(2, 8)] + [(1, 8), (1, 8), (1, 8), (1, 8), (1, 8), (1, 8), (1, 3)][: 7 * num_left]
    assert it.generate([greedy(prompt_of(30))])[0].tokens == naive(modern, 30)


def test_nothing_of_a_cancelled_prompt_meets_new_weights(golden_tokenizer, monkeypatch):
    monkeypatch.setattr(engine, "PREFILL_CHUNK", 8)
    model = make()
    it = unstoppable(model, golden_tokenizer)
    number = it.add(greedy(prompt_of(60)))
    it.step()
    it.cancel(number)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.3)
    it.refresh_weights()
    assert it.generate([greedy(prompt_of(60))])[0].tokens == naive_generate(model, prompt_of(60), 12)


@pytest.mark.parametrize("num_steps", [0, 1, 9])  # before its prompt is read, within, after
def test_the_first_of_equal_prompts_is_cancelled(modern, golden_tokenizer, monkeypatch, num_steps):
    monkeypatch.setattr(engine, "PREFILL_CHUNK", 8)
    it = unstoppable(modern, golden_tokenizer, num_rows=2)
    numbers = [it.add(greedy(prompt_of(60), seed=seed)) for seed in range(4)]
    for _ in range(num_steps):
        it.step()
    it.cancel(numbers[0])
    ended = run(it)
    assert {number: ended[number].tokens for number in ended} == dict.fromkeys(numbers[1:], naive(modern, 60))
    assert_nothing_left(it)


def test_a_stream_that_is_closed_frees_its_places(modern, golden_tokenizer, monkeypatch):
    monkeypatch.setattr(engine, "PREFILL_CHUNK", 8)
    it = unstoppable(modern, golden_tokenizer, num_rows=2)
    stream = it.stream([greedy(prompt_of(length)) for length in (5, 40, 60)])
    assert next(stream)[0] == 0
    stream.close()
    assert_nothing_left(it)
    for _ in it.stream([greedy(prompt_of(5))]):
        break  # the generator is collected
    assert_nothing_left(it)
    it.stream([greedy(prompt_of(5))])  # never begun
    assert it.generate([greedy(prompt_of(60))])[0].tokens == naive(modern, 60)


@pytest.mark.parametrize("method", ["reserve", "fill", "step"])
def test_after_a_failure_the_engine_serves_the_next(modern, golden_tokenizer, monkeypatch, method):
    it = unstoppable(modern, golden_tokenizer, num_rows=2)
    original, calls = getattr(it.decoder, method), []

    def out_of_memory_at_the_third(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise torch.OutOfMemoryError
        return original(*arguments)

    monkeypatch.setattr(it.decoder, method, out_of_memory_at_the_third)
    requests = [greedy(prompt_of(length)) for length in (5, 40, 60, 150)]
    with pytest.raises(torch.OutOfMemoryError):
        it.generate(requests)
    assert_nothing_left(it)
    assert [c.tokens for c in it.generate(requests)] == [naive(modern, length) for length in (5, 40, 60, 150)]


# ---- ends ----


@pytest.mark.parametrize(
    "length, max_tokens, num_tokens, finish",
    [
        (CONTEXT, 10, 1, "context"),
        (CONTEXT, 1, 1, "length"),
        (CONTEXT - 2, 10, 3, "context"),
        (CONTEXT - 2, 3, 3, "length"),
        (1, 10**30, CONTEXT, "context"),
    ],
)
def test_never_past_the_context(modern, golden_tokenizer, length, max_tokens, num_tokens, finish):
    requests = [greedy(prompt_of(length), max_tokens), greedy(prompt_of(5))]
    completion, neighbour = unstoppable(modern, golden_tokenizer).generate(requests)
    assert (len(completion.tokens), completion.finish) == (num_tokens, finish)
    assert completion.tokens[:3] == naive(modern, length, min(num_tokens, 3))
    assert neighbour.tokens == naive(modern, 5)


def test_a_context_of_one_token(golden_tokenizer):
    model = make(sequence_len=1)
    (completion,) = unstoppable(model, golden_tokenizer).generate([greedy([7])])
    assert (completion.tokens, completion.finish) == (naive_generate(model, [7], 1), "context")


# ---- bad input ----

SENSELESS = [
    (Request([]), "empty"),
    (Request([1] * (CONTEXT + 1)), f"{CONTEXT + 1} tokens"),
    (Request([1, V]), f"0 to {V - 1}"),
    (Request([-1]), f"0 to {V - 1}"),
    (Request([1], max_tokens=0), "max_tokens"),
    (Request([1], temperature=-1.0), "temperature"),
    (Request([1], temperature=float("nan")), "temperature"),
    (Request([1], temperature=float("inf")), "temperature"),
    (Request([1], top_k=-1), "top_k"),
    (Request([1], top_p=0.0), "top_p"),
    (Request([1], top_p=1.1), "top_p"),
    (Request([1], top_p=float("nan")), "top_p"),
    (Request([1], seed=2**64), "seed"),
    (Request([1], seed=-(2**63) - 1), "seed"),
]


@pytest.mark.parametrize("request_, words", SENSELESS)
def test_requests_that_cannot_be_served(modern, golden_tokenizer, request_, words):
    it = Engine(modern, golden_tokenizer)
    with pytest.raises(UserError, match=words) as caught:
        it.generate([Request([1]), request_])
    assert str(caught.value).startswith("request 1: ") and "\n" not in str(caught.value)
    assert_nothing_left(it)


def test_a_bad_request_leaves_the_others_untouched(modern, golden_tokenizer):
    it = unstoppable(modern, golden_tokenizer)
    numbers = [it.add(greedy(prompt_of(length))) for length in (5, 140)]
    for request, words in SENSELESS:
        with pytest.raises(UserError, match=words):
            it.add(request)
        if len(it.rows) < 2 or len(it.rows[0].completion.tokens) < 11:
            it.step()
    ended = run(it)
    assert [ended[number].tokens for number in numbers] == [naive(modern, length) for length in (5, 140)]
    assert_nothing_left(it)


def test_an_engine_without_rows(modern, golden_tokenizer):
    with pytest.raises(UserError, match="at least 1 row"):
        Engine(modern, golden_tokenizer, 0)


# ---- settings ----


def test_equal_prompts_differ_from_the_first_token_on(modern, golden_tokenizer):
    requests = [Request(prompt_of(5), 4, seed=seed) for seed in range(16)]
    texts = [tuple(c.tokens) for c in unstoppable(modern, golden_tokenizer).generate(requests)]
    assert len({text[0] for text in texts}) > 4
    assert len(set(texts)) == 16


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_p": 1e-60}, {"temperature": 1e-4}, {"temperature": 1e-60}])
def test_the_likeliest_token_alone_is_the_greedy_one(modern, golden_tokenizer, settings):
    (completion,) = unstoppable(modern, golden_tokenizer).generate([Request(prompt_of(5), 12, **settings)])
    assert completion.tokens == naive(modern, 5)


@pytest.mark.parametrize("settings", [{"top_k": V}, {"top_k": 10**30}, {"top_p": 1 - 1e-12}])
def test_limits_that_leave_out_nothing(modern, golden_tokenizer, settings):
    it = unstoppable(modern, golden_tokenizer)
    requests = [Request(prompt_of(5), seed=3), Request(prompt_of(5), seed=3, **settings)]
    (unlimited,), (alone,) = ([c.tokens for c in it.generate([request])] for request in requests)
    assert alone == unlimited
    assert [c.tokens for c in it.generate([requests[1], greedy([1]), Request([2], top_k=5)])][0] == unlimited


def test_the_hottest_temperature_is_even_chance(modern, golden_tokenizer):
    requests = [Request([1], 5, temperature=temperature, logprobs=True) for temperature in (1e10, 1e300)]
    tepid, hot = unstoppable(modern, golden_tokenizer).generate(requests)
    assert hot == tepid and hot.logprobs == pytest.approx([-torch.tensor(V).log().item()] * 5, abs=1e-4)


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**64 - 1])
def test_seeds_of_64_bits(modern, golden_tokenizer, seed):
    first, second = unstoppable(modern, golden_tokenizer).generate([Request([1], 5, seed=seed)] * 2)
    assert first == second and len(first.tokens) == 5


# ---- tools, and what it costs ----


def parrot(next_tokens, context=64):
    """A model that looks up the next token by the last one: blocks that add nothing, and lm_head as the table."""
    torch.manual_seed(0)
    model = GPT.create(GPTConfig(context, V, n_layer=1, n_head=1, n_kv_head=1, n_embd=64, **FAMILY["classic"]))
    with torch.no_grad():
        model.transformer.h[0].attn.c_proj.weight.zero_()
        model.transformer.h[0].mlp.c_proj.weight.zero_()
        model.lm_head.weight.zero_()
        for token, following in next_tokens.items():
            model.lm_head.weight[following] += F.rms_norm(model.transformer.wte.weight[token], (64,))
    return model


def chain(*tokens):
    """token → the one that follows it."""
    return dict(zip(tokens, tokens[1:], strict=False))


def spy_on_prefills(it, monkeypatch):
    """The shapes that the model is given, as they come."""
    shapes, hidden = [], it.model.hidden

    def spy(idx_BT, cache):
        shapes.append(tuple(idx_BT.shape))
        return hidden(idx_BT, cache)

    monkeypatch.setattr(it.model, "hidden", spy)
    return shapes


def spy_on_steps(it, monkeypatch):
    """How many slots each step decodes, as they come."""
    sizes, step = [], it.decoder.step

    def spy(num_slots, *rest):
        sizes.append(num_slots)
        return step(num_slots, *rest)

    monkeypatch.setattr(it.decoder, "step", spy)
    return sizes


def dictate(it, monkeypatch, scripts):
    """Makes the requests with these numbers say their scripts, as if the model had sampled them."""
    step = it.decoder.step

    def dictated(*arguments):
        tokens, logprobs = step(*arguments)
        wanted = {
            slot: scripts[row.number][len(row.completion.tokens)]
            for slot, row in enumerate(it.rows)
            if len(row.completion.tokens) < len(scripts.get(row.number, []))
        }
        if wanted:
            it.decoder.force(wanted)
        return [wanted.get(slot, token) for slot, token in enumerate(tokens)], logprobs

    monkeypatch.setattr(it.decoder, "step", dictated)


def test_a_result_is_forced_into_the_row(golden_tokenizer):
    special, (one, plus, three, four) = golden_tokenizer.special, (golden_tokenizer.encode(c)[0] for c in "1+34")
    call = [special("<|python_start|>"), one, plus, three, special("<|python_end|>")]
    output = [special("<|output_start|>"), four, special("<|output_end|>")]
    # After python_end, and within the output, the model itself would say something else: 0.
    next_tokens = chain(5, *call, 0) | chain(output[0], 0) | chain(four, 0) | chain(7, 8, 9, 7)
    next_tokens |= chain(output[-1], 6, special("<|assistant_end|>"))
    requests = [greedy([5], 30), greedy([7], 10), greedy([5], 30, logprobs=True)]
    it = Engine(parrot(next_tokens), golden_tokenizer)
    first, other, told = it.generate(requests)
    end = special("<|assistant_end|>")
    assert first == Completion([*call, *output, 6], [True] * 5 + [False] * 3 + [True], finish="stop", end_token=end)
    assert other.tokens == [8, 9, 7, 8, 9, 7, 8, 9, 7, 8] and other.sampled == [True] * 10
    check_against_one_pass(it.model, requests[2], told)
    assert told.logprobs[5:8] == [0.0] * 3 and len(told.logprobs) == len(told.tokens) + 1


@pytest.mark.parametrize("max_tokens", [6, 7])
def test_forced_tokens_count(golden_tokenizer, max_tokens):
    special, (one,) = golden_tokenizer.special, golden_tokenizer.encode("1")
    call = [special("<|python_start|>"), one, special("<|python_end|>")]
    output = [special("<|output_start|>"), one, special("<|output_end|>")]
    next_tokens = chain(5, *call, 0) | chain(output[0], 0) | {output[-1]: 6, 6: 6}
    (completion,) = Engine(parrot(next_tokens), golden_tokenizer).generate([greedy([5], max_tokens)])
    assert completion.tokens == [*call, *output, 6][:max_tokens]
    assert completion.finish == "length"


@pytest.mark.parametrize("expression", ["+", "2^", ""])
def test_without_a_result_nothing_is_forced(golden_tokenizer, expression):
    special = golden_tokenizer.special
    call = [special("<|python_start|>"), *golden_tokenizer.encode(expression), special("<|python_end|>")]
    model = parrot(chain(5, *call, 6, golden_tokenizer.bos))
    (completion,) = Engine(model, golden_tokenizer).generate([greedy([5])])
    assert (completion.tokens, completion.sampled) == ([*call, 6], [True] * len(call + [6]))
    assert (completion.finish, completion.end_token) == ("stop", golden_tokenizer.bos)


@pytest.mark.parametrize(
    "expression",
    ["(" * 600 + "1" + ")" * 600, "9" * 2000, "-" * 1500 + "1", "9**9**9**9", "'a'*10**10", "__import__('os')", "\0"],
)
def test_expressions_that_are_malicious_or_huge_end_cleanly(modern, golden_tokenizer, monkeypatch, expression):
    special = golden_tokenizer.special
    call = [special("<|python_start|>"), *golden_tokenizer.encode(expression), special("<|python_end|>")]
    model = parrot({3: 4, 4: 3}, context=len(call) + 16)
    it = unstoppable(model, golden_tokenizer)
    caller, neighbour = it.add(greedy([1], 10**9)), it.add(greedy([3], 10))
    dictate(it, monkeypatch, {caller: call})
    ended = run(it)
    assert ended[caller].tokens[: len(call)] == call and all(ended[caller].sampled)
    assert ended[caller].finish == "context" and ended[neighbour].tokens == [4, 3] * 5


def test_a_prompt_is_no_tool_call(golden_tokenizer):
    special, (one,) = golden_tokenizer.special, golden_tokenizer.encode("1")
    model = parrot({one: special("<|python_end|>"), special("<|python_end|>"): special("<|assistant_end|>")})
    (completion,) = Engine(model, golden_tokenizer).generate([greedy([special("<|python_start|>"), one])])
    assert completion.tokens == [special("<|python_end|>")] and completion.sampled == [True]


@pytest.mark.parametrize("end", ["<|assistant_end|>", "<|bos|>"])
def test_the_end_token_is_not_part_of_the_text(golden_tokenizer, monkeypatch, end):
    it = Engine(parrot(chain(5, 6, 7, golden_tokenizer.special(end))), golden_tokenizer)
    prefills, steps = spy_on_prefills(it, monkeypatch), spy_on_steps(it, monkeypatch)
    (completion,) = it.generate([greedy([5], 30)])
    assert completion == Completion([6, 7], [True, True], finish="stop", end_token=golden_tokenizer.special(end))
    assert (prefills, steps) == ([], [1, 1, 1])  # a prompt of one token has nothing before it to be read


def test_no_step_after_the_last_token_and_one_prefill_for_equal_prompts(golden_tokenizer, monkeypatch):
    it = Engine(parrot({5: 5}), golden_tokenizer)
    prefills, steps = spy_on_prefills(it, monkeypatch), spy_on_steps(it, monkeypatch)
    it.generate([greedy([5, 5], 4)] * 3 + [greedy([5, 6], 4)])  # these differ in their last token alone
    assert (prefills, steps) == ([(1, 1)], [4, 4, 4, 4])


def test_equal_prompts_that_wait_are_not_read_again(golden_tokenizer, monkeypatch):
    it = Engine(parrot({5: 5}), golden_tokenizer, num_rows=1)
    prefills = spy_on_prefills(it, monkeypatch)
    it.generate([greedy([5, 5], 2)] * 5)
    assert prefills == [(1, 1)]


def test_rows_that_have_ended_cost_nothing(golden_tokenizer, monkeypatch):
    it = Engine(parrot({5: 5, 6: 6}), golden_tokenizer, num_rows=2)
    prefills, steps = spy_on_prefills(it, monkeypatch), spy_on_steps(it, monkeypatch)
    it.generate([greedy([5], 2), greedy([6], 5), greedy([5, 5], 2)])
    assert (prefills, steps) == ([(1, 1)], [2, 2, 2, 2, 1])


def test_texts_under_way_go_on_while_a_long_prompt_is_read(golden_tokenizer, monkeypatch):
    monkeypatch.setattr(engine, "PREFILL_CHUNK", 10)
    it = Engine(parrot({5: 5}), golden_tokenizer)
    prefills = spy_on_prefills(it, monkeypatch)
    short = it.add(greedy([5], 4))
    it.step()
    long = it.add(greedy([5] * 35, 1))
    heard = [[number for number, token, _ in it.step() if token is not None] for _ in range(4)]
    assert heard == [[short], [short], [short], [long]]
    assert prefills == [(1, 10), (1, 10), (1, 10), (1, 4)]


def test_prompts_read_together_stay_within_the_memory_set_aside(golden_tokenizer, monkeypatch):
    monkeypatch.setattr(engine, "PREFILL_CHUNK", 8)
    monkeypatch.setattr(engine, "PREFILL_TOKENS", 20)
    it = Engine(parrot({5: 5}), golden_tokenizer)
    prefills = spy_on_prefills(it, monkeypatch)
    it.generate([greedy([6, i, *[5] * length], 1) for i, length in enumerate([2, 2, 2, 30, 2])])
    assert all(rows * length <= 20 for rows, length in prefills)
    assert prefills[0] == (3, 3)


def test_nothing_stays_from_one_request_to_the_next(golden_tokenizer):
    it = Engine(parrot({5: 5}), golden_tokenizer, num_rows=4)
    for _ in range(3):
        it.generate([greedy([5, 5, i], 3) for i in range(9)])
        assert_nothing_left(it)
    assert it.needed == Counter() and it.decoder.num_slots == 4


def test_sample_prompts_prints_what_fits(golden_tokenizer, capsys):
    lengths = {text: 1 + len(golden_tokenizer.encode(text)) for text in engine.SAMPLE_PROMPTS}
    context = sorted(lengths.values())[2]
    model = GPT.create(GPTConfig(context, V, n_layer=1, n_head=1, n_kv_head=1, n_embd=32))
    engine.sample_prompts(Engine(model, golden_tokenizer), max_tokens=2)
    lines = capsys.readouterr().out.splitlines()
    fitting = [text for text, length in lengths.items() if length <= context]
    assert len(fitting) >= 3
    assert [line.split(" → ")[0].strip() for line in lines] == [repr(text) for text in fitting]
