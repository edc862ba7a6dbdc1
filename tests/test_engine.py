"""
The engine: cached, chunked and batched generation against a full forward pass per token; requests that join, leave and
are cancelled at any step; tools; the number of forward passes; invalid requests.

    python -m pytest tests/test_engine.py
"""

import random
import weakref
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from conftest import golden
from factories import CPU, FAMILY, GOLDEN_VOCAB_SIZE, tiny_engine, tiny_gpt

from nanochat import checkpoint_manager
from nanochat.common import UserError
from nanochat.engine import SAMPLE_PROMPTS, Engine, pays_to_compile, sample_prompts
from nanochat.gpt import GPT, GPTConfig
from nanochat.prefill import EMPTY, Prefill
from nanochat.request import Completion, Request, random_uniforms

CONTEXT = 256  # its short window is 128
CUE = 7  # the token after which the talkative model calls the calculator


def make_model(family="modern", **changes):
    """A model with short windows (128) and full ones; family: a key of FAMILY, "modern" has GPTConfig's defaults."""
    sizes = dict(sequence_len=CONTEXT, n_layer=3, n_head=4, n_kv_head=2, window_pattern="SL")
    return tiny_gpt(**sizes | FAMILY[family] | changes)


@pytest.fixture(scope="module", params=FAMILY)
def model(request):
    return make_model(request.param)


@pytest.fixture(scope="module")
def modern():
    return make_model()


@pytest.fixture(scope="module")
def talkative(golden_tokenizer):
    """A model that often calls the calculator and often ends, while its logits depend on all earlier tokens."""
    model, (one, two, plus) = make_model(), (golden_tokenizer.encode(c)[0] for c in "12+")
    start, end, output_end, stop = (
        golden_tokenizer.special(f"<|{name}|>")
        for name in ("python_start", "python_end", "output_end", "assistant_end")
    )
    likely = {start: [one, two], one: [plus, end], two: [plus, end], plus: [one, two], end: [start], stop: [start]}
    likely |= {output_end: [start, stop, CUE], CUE: [start, one]}
    with torch.no_grad():
        for block in model.transformer.h:  # the last token has the most influence
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
    """The slow reference: no cache, a forward pass over the whole sequence for each greedy token."""
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(int(model(torch.tensor([ids], device=model.device))[0, -1].argmax()))
    return ids[len(prompt) :]


@cache
def naive(model, length, num_tokens=12):
    return naive_generate(model, prompt_of(length), num_tokens)


def slow_probs(logits, request):
    """The distribution that a token is sampled from, computed token by token in float64: (V,)."""
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
    Checks a completion by one forward pass over all its tokens: greedy tokens are the most likely ones, as in naive
    generation; sampled tokens have the reported log-probabilities; forced ones have 0.
    """
    generated = completion.tokens + ([completion.end_token] if completion.finish == "stop" else [])
    ids = torch.tensor([[*request.prompt, *generated]], device=model.device)
    with torch.no_grad():
        logits_TV = model(ids[:, :-1])[0, len(request.prompt) - 1 :].cpu()
    sampled = [*completion.sampled, True][: len(generated)]
    assert len(completion.logprobs) == len(generated) > 0
    for logits, token, logprob, is_sampled in zip(logits_TV, generated, completion.logprobs, sampled, strict=True):
        if not is_sampled:
            expected = 0.0
        elif request.temperature:
            expected = slow_probs(logits, request)[token].log().item()
        else:
            assert token == logits.argmax()
            expected = logits.log_softmax(0)[token].item()
        assert abs(logprob - expected) < 1e-4


def assert_same(completion, expected):
    """Equal except for rounding of the log-probabilities."""
    assert (completion.tokens, completion.sampled) == (expected.tokens, expected.sampled)
    assert (completion.finish, completion.end_token) == (expected.finish, expected.end_token)
    assert completion.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


def assert_nothing_left(engine):
    assert not engine.active and not engine.waiting and not engine.prompts


def make_engine(model, tokenizer, max_slots=32, *, stop=False, prefill_chunk=0, **options):
    """Unless `stop`, nothing but the limits ends a completion: random models sample end tokens too."""
    engine = tiny_engine(model, tokenizer, max_slots=max_slots, stop=stop, **options)
    engine.prefixes.chunk_size = prefill_chunk or engine.prefixes.chunk_size
    return engine


def greedy(prompt, max_tokens=12, **settings):
    return Request(prompt, max_tokens, temperature=0.0, **settings)


def run(engine):
    """Steps until all requests have ended; returns the completions by number."""
    ended = {}
    while engine.is_busy:
        ended |= {number: completion for number, token, completion in engine.step() if token is None}
    return ended


# ---- against the naive reference ----


@pytest.mark.parametrize("chunk", [1, 3, 100, 512])
def test_generate_prompts_of_all_lengths_equal_naive_generation(model, golden_tokenizer, chunk):
    lengths = [1, 2, 5, 127, 128, 129, 130, 200, CONTEXT - 12] if chunk > 1 else [1, 5, 140]
    requests = [greedy(prompt_of(length)) for length in lengths]
    engine = make_engine(model, golden_tokenizer, prefill_chunk=chunk)
    completions = engine.generate([*requests, greedy(prompt_of(CONTEXT))])
    for length, completion in zip(lengths, completions, strict=False):
        assert completion.tokens == naive(model, length)
        assert completion.sampled == [True] * 12 and completion.finish == "length"
    assert completions[-1].tokens == naive(model, CONTEXT, 1) and completions[-1].finish == "context"


@pytest.mark.slow
@pytest.mark.parametrize("max_slots", [1, 3])
@pytest.mark.parametrize("cast", [False, True], ids=["shared", "cast"])  # shared: the trainer's own weights
@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
@pytest.mark.parametrize("vintage", FAMILY)
def test_generate_every_layout_equals_full_forward_pass(vintage, n_kv_head, cast, max_slots, golden_tokenizer):
    model = make_model(vintage, n_kv_head=n_kv_head)
    if cast:
        model.cast_weights()
    mixed = [{"temperature": 0.0}, {"top_k": 5}, {"temperature": 0.0}, {"temperature": 1.5, "top_p": 0.8}, {}]
    requests = [
        Request(prompt_of(length), max_tokens, logprobs=True, **settings)
        for (length, max_tokens), settings in zip([(1, 9), (125, 12), (200, 3), (30, 5), (2, 7)], mixed, strict=True)
    ]
    completions = make_engine(model, golden_tokenizer, max_slots).generate(requests)
    for request, completion in zip(requests, completions, strict=True):
        assert len(completion.tokens) == request.max_tokens
        check_against_one_pass(model, request, completion)


@pytest.mark.slow
@pytest.mark.parametrize("cast", [False, True], ids=["shared", "cast"])
@pytest.mark.parametrize("chunk", [50, 512])
def test_generate_rings_that_wrap_equal_full_forward_pass(chunk, cast, golden_tokenizer):
    model = make_model(sequence_len=512)
    assert model.config.windows == [128, 512, 512]
    if cast:
        model.cast_weights()
    requests = [greedy(prompt_of(length), 600, logprobs=True) for length in (1, 300, 129)]
    completions = make_engine(model, golden_tokenizer, prefill_chunk=chunk).generate(requests)
    for request, completion in zip(requests, completions, strict=True):
        assert len(completion.tokens) == 513 - len(request.prompt) and completion.finish == "context"
        check_against_one_pass(model, request, completion)


def test_generate_full_windows_only_equals_naive_generation(golden_tokenizer):
    model = make_model(window_pattern="L")
    (completion,) = make_engine(model, golden_tokenizer).generate([greedy(prompt_of(180))])
    assert completion.tokens == naive(model, 180)


@torch.inference_mode()
def test_prefill_in_chunks_passes_only_keys_within_windows(modern, golden_tokenizer):
    last, prefill, tokens = EMPTY, Prefill(modern), tuple(prompt_of(220))
    for start in range(0, 220, 20):
        (last,) = prefill.read([(last, tokens[start : start + 20])])
        if start:
            assert [prefill.past[layer].size(2) for layer in range(3)] == [min(start, 128), start, start]
    engine = make_engine(modern, golden_tokenizer, prefill_chunk=20)
    engine.generate([greedy(prompt_of(220))])
    assert engine.decoder.ring_lengths == [129, CONTEXT, CONTEXT]


@pytest.mark.parametrize("name", ["gpt/case0.pt", "gpt/case1.pt", "gpt/case2.pt"])  # in the repository: case1
@pytest.mark.parametrize("chunk", [33, 512])
def test_generate_golden_models_give_golden_tokens(name, chunk, golden_tokenizer):
    case = torch.load(golden(name), weights_only=True)
    model = GPT(GPTConfig(**case["config"]))
    model.load_state_dict(case["state_dict"])
    requests = [greedy(case["prompt"], len(case["greedy"])), greedy([3, 1, 4], 5)]
    assert make_engine(model, golden_tokenizer, prefill_chunk=chunk).generate(requests)[0].tokens == case["greedy"]


def test_generate_golden_classic_checkpoint_gives_golden_tokens(golden_tokenizer, monkeypatch):
    folder = golden("checkpoint/classic")
    expected = torch.load(folder / "expected.pt", weights_only=True)
    monkeypatch.setattr(checkpoint_manager, "stage_dir", lambda stage: folder.parent)
    model = checkpoint_manager.find("base", "classic").build_model(CPU, torch.float32)
    (completion,) = make_engine(model, golden_tokenizer).generate([greedy(expected["prompt"], len(expected["greedy"]))])
    assert completion.tokens == expected["greedy"]


# ---- requests join and leave ----


def random_request(rng):
    return Request(
        [*prompt_of(rng.choice([0, 1, 9, 60, 150]), rng.randrange(2)), CUE],
        max_tokens=rng.randrange(1, 40),
        temperature=rng.choice([0.0, 0.7, 1.0]),
        top_k=rng.choice([0, 1, 5, 200, 5000]),
        top_p=rng.choice([1.0, 1.0, 0.4]),  # its last token is a likely one, so that rounding matters little
        seed=rng.randrange(3),
        logprobs=rng.random() < 0.5,
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_generate_other_requests_do_not_change_a_completion(talkative, golden_tokenizer, seed):
    rng = random.Random(seed)
    requests = [random_request(rng) for _ in range(12)]
    alone = [Engine(talkative, golden_tokenizer, 1).generate([request])[0] for request in requests]
    assert {"stop", "length"} <= {completion.finish for completion in alone}
    assert 0 < sum(not all(completion.sampled) for completion in alone) < 12  # tools in some rows
    for request, completion in zip(requests, alone, strict=True):
        if request.logprobs and request.top_k < GOLDEN_VOCAB_SIZE:
            check_against_one_pass(talkative, request, completion)
    for max_slots in (1, 3, 50):
        completions = Engine(talkative, golden_tokenizer, max_slots).generate(requests)
        for completion, expected in zip(completions, alone, strict=True):
            assert_same(completion, expected)


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 12))])
def test_step_random_schedules_of_joining_and_leaving_equal_separate_runs(talkative, golden_tokenizer, seed):
    """Completions equal those of separate runs, cancelled requests have no more events, and no state is left."""
    rng = random.Random(seed)
    chunk, length_multiple = rng.choice([1, 7, 64, 512]), rng.choice([1, 16, 128])
    engine = make_engine(talkative, golden_tokenizer, rng.randrange(1, 6), stop=True, prefill_chunk=chunk)
    engine.length_multiple = length_multiple  # slots grow while requests are active
    requests, generated, ended, cancelled = {}, {}, {}, set()
    to_add = 14
    while to_add or engine.is_busy:
        action = rng.random()
        if action < 0.15 and to_add:
            to_add -= 1
            request = random_request(rng)
            number = engine.add(request)
            requests[number], generated[number] = request, []
        elif action < 0.2 and requests:
            number = rng.choice(list(requests))  # active, waiting or ended
            engine.cancel(number)
            cancelled |= {number} - set(ended)
        else:
            for number, token, completion in engine.step():
                assert number not in ended and number not in cancelled
                if token is None:
                    ended[number] = completion
                else:
                    generated[number].append(token)
                    assert completion.tokens == generated[number]
    assert set(requests) == set(ended) | cancelled
    assert_nothing_left(engine)
    other = Engine(talkative, golden_tokenizer, 1)
    for number, completion in ended.items():
        assert_same(completion, other.generate([requests[number]])[0])


def test_stream_yields_every_token_and_one_end_per_request(modern, golden_tokenizer):
    requests = [greedy(prompt_of(4, seed), max_tokens) for seed, max_tokens in enumerate([5, 1, 3, 7])]
    engine = make_engine(modern, golden_tokenizer, max_slots=2)
    generated = {i: [] for i in range(4)}
    ended = {}
    for index, token, completion in engine.stream(requests):
        assert index not in ended
        if token is None:
            ended[index] = completion
        else:
            generated[index].append(token)
            assert completion.tokens == generated[index]
    assert [ended[i] for i in range(4)] == engine.generate(requests)
    assert [len(generated[i]) for i in range(4)] == [5, 1, 3, 7]


def test_step_slots_grow_while_requests_are_active(modern, golden_tokenizer):
    engine = make_engine(modern, golden_tokenizer)
    requests, ended = {}, {}
    for length, max_tokens in ((1, 60), (3, 40), (150, 20), (100, 156), (CONTEXT, 1)):
        request = greedy(prompt_of(length), max_tokens, logprobs=True)
        requests[engine.add(request)] = request
        for _ in range(5):
            ended |= {number: completion for number, token, completion in engine.step() if token is None}
    ended |= run(engine)
    assert (engine.decoder.num_slots, engine.decoder.length) == (5, CONTEXT)
    for number, request in requests.items():
        check_against_one_pass(modern, request, ended[number])


def test_generate_hundred_requests_in_three_rows(modern, golden_tokenizer):
    rng = random.Random(0)
    requests = [
        greedy(prompt_of(rng.randrange(1, 30), i), rng.randrange(1, 6), seed=i, logprobs=True) for i in range(100)
    ]
    engine = make_engine(modern, golden_tokenizer, max_slots=3)
    for request, completion in zip(requests, engine.generate(requests), strict=True):
        assert len(completion.tokens) == request.max_tokens
        check_against_one_pass(modern, request, completion)
    assert engine.decoder.num_slots == 3
    assert_nothing_left(engine)


def test_generate_reused_slot_keeps_nothing_of_earlier_request(modern, golden_tokenizer):
    lengths = [150, 3, 140, 1]
    completions = make_engine(modern, golden_tokenizer, max_slots=1).generate([greedy(prompt_of(n)) for n in lengths])
    assert [c.tokens for c in completions] == [naive(modern, n) for n in lengths]


def test_generate_no_requests_returns_no_completions(modern, golden_tokenizer):
    assert Engine(modern, golden_tokenizer).generate([]) == []


def test_generate_leaves_gradients_enabled(modern, golden_tokenizer):
    make_engine(modern, golden_tokenizer).generate([greedy([1, 2])])
    loss = modern(torch.tensor([[1, 2]]), torch.tensor([[2, 3]]))
    assert loss.requires_grad


# ---- cancel ----


def test_cancel_active_request_leaves_others_unchanged(modern, golden_tokenizer):
    engine = make_engine(modern, golden_tokenizer, max_slots=3)
    numbers = [engine.add(greedy(prompt_of(length))) for length in (5, 140, 60, 2)]
    engine.step()
    engine.cancel(numbers[0])  # the last slot moves into its slot
    engine.cancel(numbers[0])
    engine.cancel(99)
    ended = run(engine)
    assert {number: ended[number].tokens for number in ended} == {
        numbers[i]: naive(modern, length) for i, length in ((1, 140), (2, 60), (3, 2))
    }
    assert_nothing_left(engine)


@pytest.mark.parametrize("num_left", [0, 1])
def test_cancel_during_prefill_stops_reading_that_prompt(modern, golden_tokenizer, monkeypatch, num_left):
    engine = make_engine(modern, golden_tokenizer, prefill_chunk=8)
    shapes = spy_on_prefills(engine, monkeypatch)
    numbers = [engine.add(greedy(prompt_of(length))) for length in (60, 30)]
    engine.step()
    for number in numbers[num_left:]:
        engine.cancel(number)
    if num_left == 0:
        assert not engine.is_busy
        assert_nothing_left(engine)
    ended = run(engine)
    assert [completion.tokens for completion in ended.values()] == [naive(modern, 60)][:num_left]
    assert shapes == [(1, 8)] * 2 + [*[(1, 8)] * 6, (1, 3)][: 7 * num_left]
    assert engine.generate([greedy(prompt_of(30))])[0].tokens == naive(modern, 30)


def test_cancel_during_prefill_leaves_no_state_for_new_weights(golden_tokenizer):
    model = make_model()
    engine = make_engine(model, golden_tokenizer, prefill_chunk=8)
    number = engine.add(greedy(prompt_of(60)))
    engine.step()
    engine.cancel(number)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.3)
    engine.refresh_weights()
    assert engine.generate([greedy(prompt_of(60))])[0].tokens == naive_generate(model, prompt_of(60), 12)


@pytest.mark.parametrize("num_steps", [0, 1, 9])  # before, during and after its prefill
def test_cancel_first_of_equal_prompts_keeps_prefix_for_others(modern, golden_tokenizer, num_steps):
    engine = make_engine(modern, golden_tokenizer, max_slots=2, prefill_chunk=8)
    numbers = [engine.add(greedy(prompt_of(60), seed=seed)) for seed in range(4)]
    for _ in range(num_steps):
        engine.step()
    engine.cancel(numbers[0])
    ended = run(engine)
    assert {number: ended[number].tokens for number in ended} == dict.fromkeys(numbers[1:], naive(modern, 60))
    assert_nothing_left(engine)


def test_stream_closed_early_frees_slots(modern, golden_tokenizer):
    engine = make_engine(modern, golden_tokenizer, max_slots=2, prefill_chunk=8)
    stream = engine.stream([greedy(prompt_of(length)) for length in (5, 40, 60)])
    assert next(stream)[0] == 0
    stream.close()
    assert_nothing_left(engine)
    for _ in engine.stream([greedy(prompt_of(5))]):
        break  # the generator is collected
    assert_nothing_left(engine)
    engine.stream([greedy(prompt_of(5))])  # never started
    assert engine.generate([greedy(prompt_of(60))])[0].tokens == naive(modern, 60)


@pytest.mark.parametrize("method", ["reserve", "fill", "step"])
def test_generate_after_failure_works_again(modern, golden_tokenizer, monkeypatch, method):
    engine = make_engine(modern, golden_tokenizer, max_slots=2)
    original, calls = getattr(engine.decoder, method), []

    def out_of_memory_at_the_third(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise torch.OutOfMemoryError
        return original(*arguments)

    monkeypatch.setattr(engine.decoder, method, out_of_memory_at_the_third)
    requests = [greedy(prompt_of(length)) for length in (5, 40, 60, 150)]
    with pytest.raises(torch.OutOfMemoryError):
        engine.generate(requests)
    assert_nothing_left(engine)
    assert [c.tokens for c in engine.generate(requests)] == [naive(modern, length) for length in (5, 40, 60, 150)]


# ---- limits ----


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
def test_generate_stops_at_max_tokens_or_context(modern, golden_tokenizer, length, max_tokens, num_tokens, finish):
    requests = [greedy(prompt_of(length), max_tokens), greedy(prompt_of(5))]
    completion, neighbour = make_engine(modern, golden_tokenizer).generate(requests)
    assert (len(completion.tokens), completion.finish) == (num_tokens, finish)
    assert completion.tokens[:3] == naive(modern, length, min(num_tokens, 3))
    assert neighbour.tokens == naive(modern, 5)


def test_generate_context_of_one_token(golden_tokenizer):
    model = make_model(sequence_len=1)
    (completion,) = make_engine(model, golden_tokenizer).generate([greedy([7])])
    assert (completion.tokens, completion.finish) == (naive_generate(model, [7], 1), "context")


# ---- invalid requests ----

INVALID = [
    (Request([]), "empty"),
    (Request([1] * (CONTEXT + 1)), f"{CONTEXT + 1} tokens"),
    (Request([1, GOLDEN_VOCAB_SIZE]), f"0 to {GOLDEN_VOCAB_SIZE - 1}"),
    (Request([-1]), f"0 to {GOLDEN_VOCAB_SIZE - 1}"),
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


@pytest.mark.parametrize("request_, pattern", INVALID)
def test_generate_invalid_request_raises_before_generating(modern, golden_tokenizer, request_, pattern):
    engine = Engine(modern, golden_tokenizer)
    with pytest.raises(UserError, match=pattern) as caught:
        engine.generate([Request([1]), request_])
    assert str(caught.value).startswith("request 1: ") and "\n" not in str(caught.value)
    assert_nothing_left(engine)


def test_add_invalid_request_leaves_others_unchanged(modern, golden_tokenizer):
    engine = make_engine(modern, golden_tokenizer)
    numbers = [engine.add(greedy(prompt_of(length))) for length in (5, 140)]
    for request, pattern in INVALID:
        with pytest.raises(UserError, match=pattern):
            engine.add(request)
        if len(engine.active) < 2 or len(engine.active[0].completion.tokens) < 11:
            engine.step()
    ended = run(engine)
    assert [ended[number].tokens for number in numbers] == [naive(modern, length) for length in (5, 140)]
    assert_nothing_left(engine)


def test_engine_without_rows_is_an_error(modern, golden_tokenizer):
    with pytest.raises(UserError, match="at least 1 slot"):
        Engine(modern, golden_tokenizer, 0)


# ---- sampling parameters ----


def test_generate_different_seeds_differ_from_first_token(modern, golden_tokenizer):
    requests = [Request(prompt_of(5), 4, seed=seed) for seed in range(16)]
    texts = [tuple(c.tokens) for c in make_engine(modern, golden_tokenizer).generate(requests)]
    assert len({text[0] for text in texts}) > 4
    assert len(set(texts)) == 16


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_p": 1e-60}, {"temperature": 1e-4}, {"temperature": 1e-60}])
def test_generate_limits_to_one_token_equal_greedy(modern, golden_tokenizer, settings):
    (completion,) = make_engine(modern, golden_tokenizer).generate([Request(prompt_of(5), 12, **settings)])
    assert completion.tokens == naive(modern, 5)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"top_k": GOLDEN_VOCAB_SIZE}, {"top_k": 10**30}, {"top_p": 1 - 1e-12}])
def test_generate_limits_that_exclude_nothing_change_nothing(modern, golden_tokenizer, settings):
    engine = make_engine(modern, golden_tokenizer)
    requests = [Request(prompt_of(5), seed=3), Request(prompt_of(5), seed=3, **settings)]
    (unlimited,), (alone,) = ([c.tokens for c in engine.generate([request])] for request in requests)
    assert alone == unlimited
    assert [c.tokens for c in engine.generate([requests[1], greedy([1]), Request([2], top_k=5)])][0] == unlimited


def test_generate_very_high_temperature_is_uniform(modern, golden_tokenizer):
    requests = [Request([1], 5, temperature=temperature, logprobs=True) for temperature in (1e10, 1e300)]
    tepid, hot = make_engine(modern, golden_tokenizer).generate(requests)
    assert hot == tepid and hot.logprobs == pytest.approx([-torch.tensor(GOLDEN_VOCAB_SIZE).log().item()] * 5, abs=1e-4)


def test_random_uniforms_all_64_bits_of_the_seed_matter():
    seeds = [0, 1, 2**32, 2**32 + 1, 2**33, 2**63, 2**64 - 1, -2, -(2**63) + 1]
    draws = {seed: tuple(random_uniforms(seed, 4).tolist()) for seed in seeds}
    assert len(set(draws.values())) == len(seeds)
    assert all(0 <= number < 1 for numbers in draws.values() for number in numbers)
    assert draws[2**64 - 1] == tuple(random_uniforms(-1, 4).tolist())


def test_random_uniforms_small_seeds_equal_torchs_generator():
    for seed in (0, 5, 2**32 - 1):
        expected = torch.rand(9, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(random_uniforms(seed, 9), expected)


def test_generate_seeds_that_differ_by_two_to_the_32_differ(modern, golden_tokenizer):
    requests = [Request(prompt_of(5), 8, seed=seed) for seed in (7, 7 + 2**32, 7 + 2**33)]
    completions = make_engine(modern, golden_tokenizer).generate(requests)
    assert len({tuple(completion.tokens) for completion in completions}) == 3


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**64 - 1])
def test_generate_extreme_seeds_are_reproducible(modern, golden_tokenizer, seed):
    first, second = make_engine(modern, golden_tokenizer).generate([Request([1], 5, seed=seed)] * 2)
    assert first == second and len(first.tokens) == 5


# ---- tools, and the number of forward passes ----


def parrot(next_tokens, context=64):
    """A model whose next token depends on the last one only: its blocks add nothing, and lm_head is a look-up table."""
    sizes = dict(sequence_len=context, n_layer=1, n_head=1, n_embd=64)
    model = tiny_gpt(initial=True, **sizes | FAMILY["classic"])
    with torch.no_grad():
        model.transformer.h[0].attn.c_proj.weight.zero_()
        model.transformer.h[0].mlp.c_proj.weight.zero_()
        model.lm_head.weight.zero_()
        for token, following in next_tokens.items():
            model.lm_head.weight[following] += F.rms_norm(model.transformer.wte.weight[token], (64,))
    return model


def chain(*tokens):
    """A dict from each token to the next one."""
    return dict(zip(tokens, tokens[1:], strict=False))


def spy_on_prefills(engine, monkeypatch):
    """A list that grows by the shape of each forward pass over prompts."""
    shapes, hidden = [], engine.model.hidden

    def spy(idx_BT, cache):
        shapes.append(tuple(idx_BT.shape))
        return hidden(idx_BT, cache)

    monkeypatch.setattr(engine.model, "hidden", spy)
    return shapes


def spy_on_steps(engine, monkeypatch):
    """A list that grows by the number of slots that each step decodes."""
    sizes, step = [], engine.decoder.step

    def spy(tokens, sampling):
        sizes.append(len(tokens))
        return step(tokens, sampling)

    monkeypatch.setattr(engine.decoder, "step", spy)
    return sizes


def dictate(engine, monkeypatch, scripts):
    """Replaces the sampled tokens of requests by scripts, which are given by the requests' numbers."""
    step = engine.decoder.step

    def dictated(*arguments):
        tokens, logprobs = step(*arguments)
        for slot, row in enumerate(engine.active):
            script = scripts.get(row.number, [])
            if len(row.completion.tokens) < len(script):
                tokens[slot] = [script[len(row.completion.tokens)]]
        return tokens, logprobs

    monkeypatch.setattr(engine.decoder, "step", dictated)


def test_tool_result_is_forced_into_completion(golden_tokenizer):
    special, (one, plus, three, four) = golden_tokenizer.special, (golden_tokenizer.encode(c)[0] for c in "1+34")
    call = [special("<|python_start|>"), one, plus, three, special("<|python_end|>")]
    output = [special("<|output_start|>"), four, special("<|output_end|>")]
    # After python_end and within the output, the model itself would sample 0.
    next_tokens = chain(5, *call, 0) | chain(output[0], 0) | chain(four, 0) | chain(7, 8, 9, 7)
    next_tokens |= chain(output[-1], 6, special("<|assistant_end|>"))
    requests = [greedy([5], 30), greedy([7], 10), greedy([5], 30, logprobs=True)]
    engine = Engine(parrot(next_tokens), golden_tokenizer)
    first, other, with_logprobs = engine.generate(requests)
    end = special("<|assistant_end|>")
    assert first == Completion([*call, *output, 6], [True] * 5 + [False] * 3 + [True], finish="stop", end_token=end)
    assert other.tokens == [8, 9, 7, 8, 9, 7, 8, 9, 7, 8] and other.sampled == [True] * 10
    check_against_one_pass(engine.model, requests[2], with_logprobs)
    assert with_logprobs.logprobs[5:8] == [0.0] * 3 and len(with_logprobs.logprobs) == len(with_logprobs.tokens) + 1


@pytest.mark.parametrize("max_tokens", [6, 7])
def test_tool_forced_tokens_count_towards_max_tokens(golden_tokenizer, max_tokens):
    special, (one,) = golden_tokenizer.special, golden_tokenizer.encode("1")
    call = [special("<|python_start|>"), one, special("<|python_end|>")]
    output = [special("<|output_start|>"), one, special("<|output_end|>")]
    next_tokens = chain(5, *call, 0) | chain(output[0], 0) | {output[-1]: 6, 6: 6}
    (completion,) = Engine(parrot(next_tokens), golden_tokenizer).generate([greedy([5], max_tokens)])
    assert completion.tokens == [*call, *output, 6][:max_tokens]
    assert completion.finish == "length"


@pytest.mark.parametrize("expression", ["+", "2^", ""])
def test_tool_call_without_result_forces_nothing(golden_tokenizer, expression):
    special = golden_tokenizer.special
    call = [special("<|python_start|>"), *golden_tokenizer.encode(expression), special("<|python_end|>")]
    model = parrot(chain(5, *call, 6, golden_tokenizer.bos))
    (completion,) = Engine(model, golden_tokenizer).generate([greedy([5])])
    assert (completion.tokens, completion.sampled) == ([*call, 6], [True] * len(call + [6]))
    assert (completion.finish, completion.end_token) == ("stop", golden_tokenizer.bos)


@pytest.mark.slow
@pytest.mark.parametrize(
    "expression",
    ["(" * 600 + "1" + ")" * 600, "9" * 2000, "-" * 1500 + "1", "9**9**9**9", "'a'*10**10", "__import__('os')", "\0"],
)
def test_tool_malicious_or_huge_expression_forces_nothing(modern, golden_tokenizer, monkeypatch, expression):
    special = golden_tokenizer.special
    call = [special("<|python_start|>"), *golden_tokenizer.encode(expression), special("<|python_end|>")]
    model = parrot({3: 4, 4: 3}, context=len(call) + 16)
    engine = make_engine(model, golden_tokenizer)
    caller, neighbour = engine.add(greedy([1], 10**9)), engine.add(greedy([3], 10))
    dictate(engine, monkeypatch, {caller: call})
    ended = run(engine)
    assert ended[caller].tokens[: len(call)] == call and all(ended[caller].sampled)
    assert ended[caller].finish == "context" and ended[neighbour].tokens == [4, 3] * 5


def test_tool_markers_in_prompt_are_ignored(golden_tokenizer):
    special, (one,) = golden_tokenizer.special, golden_tokenizer.encode("1")
    model = parrot({one: special("<|python_end|>"), special("<|python_end|>"): special("<|assistant_end|>")})
    (completion,) = Engine(model, golden_tokenizer).generate([greedy([special("<|python_start|>"), one])])
    assert completion.tokens == [special("<|python_end|>")] and completion.sampled == [True]


@pytest.mark.parametrize("end", ["<|assistant_end|>", "<|bos|>"])
def test_generate_end_token_is_not_part_of_completion(golden_tokenizer, monkeypatch, end):
    engine = Engine(parrot(chain(5, 6, 7, golden_tokenizer.special(end))), golden_tokenizer)
    prefills, steps = spy_on_prefills(engine, monkeypatch), spy_on_steps(engine, monkeypatch)
    (completion,) = engine.generate([greedy([5], 30)])
    assert completion == Completion([6, 7], [True, True], finish="stop", end_token=golden_tokenizer.special(end))
    assert (prefills, steps) == ([], [1, 1, 1])  # a prompt of one token needs no prefill


def test_generate_equal_prompts_one_prefill_and_no_extra_steps(golden_tokenizer, monkeypatch):
    engine = Engine(parrot({5: 5}), golden_tokenizer)
    prefills, steps = spy_on_prefills(engine, monkeypatch), spy_on_steps(engine, monkeypatch)
    engine.generate([greedy([5, 5], 4)] * 3 + [greedy([5, 6], 4)])  # the last prompt differs in its last token only
    assert (prefills, steps) == ([(1, 1)], [4, 4, 4, 4])


def test_generate_waiting_requests_share_one_prefill(golden_tokenizer, monkeypatch):
    engine = Engine(parrot({5: 5}), golden_tokenizer, max_slots=1)
    prefills = spy_on_prefills(engine, monkeypatch)
    engine.generate([greedy([5, 5], 2)] * 5)
    assert prefills == [(1, 1)]


def test_generate_finished_requests_are_not_decoded(golden_tokenizer, monkeypatch):
    engine = Engine(parrot({5: 5, 6: 6}), golden_tokenizer, max_slots=2)
    prefills, steps = spy_on_prefills(engine, monkeypatch), spy_on_steps(engine, monkeypatch)
    engine.generate([greedy([5], 2), greedy([6], 5), greedy([5, 5], 2)])
    assert (prefills, steps) == ([(1, 1)], [2, 2, 2, 2, 1])


def test_step_active_requests_continue_during_long_prefill(golden_tokenizer, monkeypatch):
    engine = make_engine(parrot({5: 5}), golden_tokenizer, stop=True, prefill_chunk=10)
    prefills = spy_on_prefills(engine, monkeypatch)
    short = engine.add(greedy([5], 4))
    engine.step()
    long = engine.add(greedy([5] * 35, 1))
    decoded = [[number for number, token, _ in engine.step() if token is not None] for _ in range(4)]
    assert decoded == [[short], [short], [short], [long]]
    assert prefills == [(1, 10), (1, 10), (1, 10), (1, 4)]


def test_prefill_batch_stays_within_max_prefill_tokens(golden_tokenizer, monkeypatch):
    engine = make_engine(parrot({5: 5}), golden_tokenizer, stop=True, prefill_chunk=8)
    engine.prefixes.max_tokens_per_step = 20
    prefills = spy_on_prefills(engine, monkeypatch)
    engine.generate([greedy([6, i, *[5] * length], 1) for i, length in enumerate([2, 2, 2, 30, 2])])
    assert all(rows * length <= 20 for rows, length in prefills)
    assert prefills[0] == (3, 3)


def test_generate_repeatedly_leaves_no_state(golden_tokenizer):
    engine = Engine(parrot({5: 5}), golden_tokenizer, max_slots=4)
    for _ in range(3):
        engine.generate([greedy([5, 5, i], 3) for i in range(9)])
        assert_nothing_left(engine)
    assert engine.decoder.num_slots == 4


# ---- cached prefixes ----


def cold(engine, request):
    """The completion of a request by an engine whose cache is empty."""
    engine.refresh_weights()
    assert engine.prefixes.num_bytes == engine.prefixes.num_tokens == 0
    return engine.generate([request])[0]


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_cached_prefixes_leave_every_bit_of_completions_unchanged(modern, golden_tokenizer, precision):
    torch.set_float32_matmul_precision(precision)  # MKL or oneDNN
    try:
        engine = make_engine(modern, golden_tokenizer, prefill_chunk=16)
        first, other = prompt_of(150), prompt_of(150, seed=1)
        prompts = [
            first,
            first[:70] + other,
            first[:70] + other[:30],
            first[:16],
            first[:17],
            other,
            first[:150],
            first,
        ]
        requests = [Request(prompt, 8, temperature=0.9, logprobs=True) for prompt in prompts]
        expected = [cold(engine, request) for request in requests]
        for order in (requests, requests[::-1]):
            engine.refresh_weights()
            engine.generate(order)  # read together, so that they share chunks
            for request, completion in zip(requests, expected, strict=True):
                assert engine.generate([request])[0] == completion  # log-probabilities too
    finally:
        torch.set_float32_matmul_precision("highest")


def test_next_turn_reads_only_what_is_new(modern, golden_tokenizer, monkeypatch):
    engine = make_engine(modern, golden_tokenizer, prefill_chunk=8)
    shapes = spy_on_prefills(engine, monkeypatch)
    prompt = prompt_of(21)
    for _ in range(10):
        (completion,) = engine.generate([greedy(prompt, 6)])
        prompt = prompt + completion.tokens + prompt_of(14, seed=len(prompt))
    lengths = [20 * turn for turn in range(11)]  # without the last token
    num_read = [sum(rows * tokens for rows, tokens in shapes)]
    assert num_read == [sum(new - old // 8 * 8 for old, new in zip(lengths, lengths[1:], strict=False))]
    assert all(rows == 1 for rows, _ in shapes)
    assert engine.prefixes.num_tokens == 200


def test_read_ahead_next_turn_reads_only_the_new_message(modern, golden_tokenizer, monkeypatch):
    """And the completions are, bit by bit, those of an engine that has read nothing before."""
    engine = make_engine(modern, golden_tokenizer, prefill_chunk=16)
    fresh = make_engine(modern, golden_tokenizer, prefill_chunk=16)
    shapes = spy_on_prefills(engine, monkeypatch)
    prompt: list[int] = []
    for turn in range(5):
        prompt = prompt + prompt_of(10, seed=turn)
        shapes.clear()
        (completion,) = engine.generate([greedy(prompt, 20, logprobs=True)])
        assert shapes == [(1, 9)]  # all but the last token
        engine.read_ahead(prompt, completion)
        assert shapes == [(1, 9), (1, 16), (1, 15)]  # message, completion, end of turn: 31 tokens
        assert completion == cold(fresh, greedy(prompt, 20, logprobs=True))
        prompt = prompt + completion.tokens + [engine.end_of_turn]
    assert engine.prefixes.num_tokens == len(prompt)
    engine.read_ahead(prompt_of(CONTEXT), completion)  # no next turn fits the context
    assert engine.prefixes.num_tokens == len(prompt)


def test_common_prefix_is_read_once_by_requests_at_the_same_time_and_later(modern, golden_tokenizer, monkeypatch):
    engine = make_engine(modern, golden_tokenizer, prefill_chunk=8)
    shapes = spy_on_prefills(engine, monkeypatch)
    examples = prompt_of(24)
    engine.generate([greedy([*examples, i, 5, 6], 2) for i in range(4)])
    assert shapes == [(1, 8)] * 3 + [(4, 2)]
    engine.generate([greedy([*examples, 9, 5], 2)])
    assert shapes[4:] == [(1, 1)]


@pytest.mark.parametrize("num_chunks", [0, 2, 5])
def test_cached_prefixes_stay_within_their_limit(modern, golden_tokenizer, monkeypatch, num_chunks):
    engine = make_engine(modern, golden_tokenizer, max_slots=3, prefill_chunk=16)
    engine.generate([greedy(prompt_of(17), 1)])
    engine.prefixes.max_bytes = num_chunks * engine.prefixes.num_bytes
    lengths = [150, 60, 140, 33]
    for completion, length in zip(engine.generate([greedy(prompt_of(n)) for n in lengths]), lengths, strict=True):
        assert completion.tokens == naive(modern, length)
    assert len(engine.prefixes.chunks) == num_chunks
    sizes = [cache.nbytes for chunk in engine.prefixes.chunks.values() for cache in chunk.caches.values()]
    assert engine.prefixes.num_bytes == sum(sizes) == engine.prefixes.num_tokens * 2 * 3 * 16 * 4
    assert_nothing_left(engine)


def test_cached_prefixes_used_longest_ago_leave_first_and_ends_before_beginnings(modern, golden_tokenizer, monkeypatch):
    engine = make_engine(modern, golden_tokenizer, prefill_chunk=8)
    engine.generate([greedy(prompt_of(9), 1)])
    engine.prefixes.max_bytes = 5 * engine.prefixes.num_bytes
    shapes = spy_on_prefills(engine, monkeypatch)
    for length, num_tokens in ((25, 24), (18, 17), (25, 0), (26, 25), (25, 8), (26, 9)):
        shapes.clear()
        engine.generate([greedy(prompt_of(length), 1)])
        assert sum(tokens for _, tokens in shapes) == num_tokens


def test_refresh_weights_empties_the_prefix_cache(golden_tokenizer):
    model = make_model()
    engine = make_engine(model, golden_tokenizer, prefill_chunk=8)
    engine.generate([greedy(prompt_of(60))])
    assert engine.prefixes.num_tokens == 56
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.3)
    assert cold(engine, greedy(prompt_of(60))).tokens == naive_generate(model, prompt_of(60), 12)


def test_cancelled_requests_release_their_prompts(modern, golden_tokenizer):
    engine = make_engine(modern, golden_tokenizer, max_slots=1, prefill_chunk=8)
    engine.prefixes.max_bytes = 0
    numbers = [engine.add(greedy(prompt_of(length))) for length in (60, 60, 30)]
    engine.step()
    chunk = weakref.ref(engine.waiting[0][1].last_chunk)
    assert chunk().stop == 8 and len(engine.prompts) == 2
    engine.cancel(numbers[0])
    assert chunk().stop == 8
    engine.cancel(numbers[1])
    assert chunk() is None and len(engine.prompts) == 1


def test_sample_prompts_prints_prompts_that_fit(golden_tokenizer, capsys):
    lengths = {text: 1 + len(golden_tokenizer.encode(text)) for text in SAMPLE_PROMPTS}
    context = sorted(lengths.values())[2]
    model = tiny_gpt(sequence_len=context, n_layer=1)
    sample_prompts(Engine(model, golden_tokenizer), max_tokens=2)
    lines = capsys.readouterr().out.splitlines()
    fitting = [text for text, length in lengths.items() if length <= context]
    assert len(fitting) >= 3
    assert [line.split(" → ")[0].strip() for line in lines] == [repr(text) for text in fitting]


def test_requests_that_share_a_prompt_fill_their_slots_together(modern, golden_tokenizer, monkeypatch):
    engine = make_engine(modern, golden_tokenizer, max_slots=6)
    fill, filled = engine.decoder.fill, []

    def note(first_slot, num_slots, prefix):
        filled.append((first_slot, num_slots))
        fill(first_slot, num_slots, prefix)

    monkeypatch.setattr(engine.decoder, "fill", note)
    lengths = [140, 140, 140, 9, 9, 140]
    requests = [Request(prompt_of(length), 5 + i, seed=i, logprobs=True) for i, length in enumerate(lengths)]
    for request, completion in zip(requests, engine.generate(requests), strict=True):
        check_against_one_pass(modern, request, completion)
    assert filled == [(0, 3), (3, 2), (5, 1)]


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 9, 140, 256])
def test_filling_and_moving_slots_does_not_wait_for_the_gpu(length, golden_tokenizer):
    model = make_model(device="cuda")
    engine = make_engine(model, golden_tokenizer, max_slots=4)
    engine.prefixes.chunk_size = 50
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.inference_mode():
            for i in range(4):
                engine.add(Request(prompt_of(length), 3, seed=i))
                engine.add(Request(prompt_of(max(1, length // 2)), 3, seed=i))
            while not engine.active:
                engine.prefixes.read_next(prompt for _, prompt in engine.waiting)
                engine._fill_slots()
            engine._free_slot(0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_pays_to_compile_many_completions_only():
    assert not pays_to_compile(num_completions=16, max_tokens=256)
    assert pays_to_compile(num_completions=8_000, max_tokens=256)
