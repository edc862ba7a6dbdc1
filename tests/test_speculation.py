"""
Speculative decoding: completions are the same with and without it, and take fewer steps where text repeats.

    python -m pytest tests/test_speculation.py
"""

import random
from collections import Counter

import pytest
import torch
from factories import FAMILY, NEEDS_NUMBERS
from test_engine import (
    CONTEXT,
    assert_same,
    chain,
    check_against_one_pass,
    greedy,
    make_engine,
    make_model,
    parrot,
    prompt_of,
    random_request,
    run,
    slow_probs,
    talkative,  # noqa: F401  a fixture
)

from nanochat import hardware
from nanochat.common import UserError
from nanochat.engine import Engine
from nanochat.request import Request
from nanochat.speculation import Drafter


def spy_on_shapes(engine, monkeypatch):
    """A list that grows by (slots, tokens per slot) of each step."""
    shapes, step = [], engine.decoder.step

    def spy(tokens, sampling):
        shapes.append((len(tokens), len(tokens[0])))
        return step(tokens, sampling)

    monkeypatch.setattr(engine.decoder, "step", spy)
    return shapes


# ---- drafts ----


def test_draft_follows_the_last_occurrence_of_the_longest_ngram():
    assert Drafter([1, 2, 3, 9, 2, 3, 8, 1, 2, 3]).draft(2) == [9, 2]
    assert Drafter([2, 3, 9, 2, 3, 8, 7, 2, 3]).draft(2) == [8, 7]


@pytest.mark.parametrize("tokens", [[], [1], [1, 1], [1, 2, 3, 4], [1, 2, 3, 2]])
def test_draft_without_a_repeated_ngram_is_empty(tokens):
    assert Drafter(tokens).draft(3) == []


def test_draft_of_a_short_repetition_continues_it():
    assert Drafter([5, 5, 5]).draft(3) == [5, 5, 5]
    assert Drafter([1, 2, 3, 1, 2, 3, 1]).draft(7) == [2, 3, 1, 2, 3, 1, 2]


# ---- exactness ----


def repetitive(length):
    return (prompt_of(7) * length)[:length]


REQUESTS = [
    greedy(prompt_of(1), 40, logprobs=True),
    greedy(repetitive(150), CONTEXT, logprobs=True),  # until the context is full
    Request(repetitive(30), 90, seed=1, logprobs=True),
    Request(repetitive(60), 50, top_k=3, seed=2, logprobs=True),
    Request(prompt_of(60), 30, top_k=50, top_p=0.5, temperature=0.7, seed=3, logprobs=True),
    greedy(repetitive(130), 1, logprobs=True),
    greedy(repetitive(20), 2, logprobs=True),
]


@pytest.mark.parametrize("family", FAMILY)
@pytest.mark.parametrize("max_slots", [1, 3])
def test_generate_with_drafts_equals_without(family, max_slots, golden_tokenizer):
    model = make_model(family)
    expected = make_engine(model, golden_tokenizer, max_slots).generate(REQUESTS)
    engine = make_engine(model, golden_tokenizer, max_slots, speculate=3)
    for request, completion, wanted in zip(REQUESTS, engine.generate(REQUESTS), expected, strict=True):
        assert_same(completion, wanted)
        check_against_one_pass(model, request, completion)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_step_with_drafts_and_tools_equals_without(talkative, golden_tokenizer, seed):  # noqa: F811
    """Requests of all kinds that join while others are active; this model repeats itself and calls the calculator."""
    rng = random.Random(seed)
    requests = [random_request(rng) for _ in range(12)]
    expected = make_engine(talkative, golden_tokenizer, 1, stop=True).generate(requests)
    assert not all(all(completion.sampled) for completion in expected)
    engine = make_engine(talkative, golden_tokenizer, 4, stop=True, speculate=1 + seed * 2)
    numbers, ended = [], {}
    for request in requests:
        numbers.append(engine.add(request))
        ended |= {number: completion for number, token, completion in engine.step() if token is None}
    ended |= run(engine)
    for number, wanted in zip(numbers, expected, strict=True):
        assert_same(ended[number], wanted)


def test_generate_drafted_tokens_follow_the_models_distribution(golden_tokenizer):
    """
    Chi-square test of two consecutive tokens over many seeds, where some drafts are accepted and some are not. The
    bound is exceeded with a probability of 1e-4, but the seeds are fixed.
    """
    model = make_model("classic", vocab_size=8, n_layer=1)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.3)
    prompt, num_seeds = [1, 2, 3, 4, 1, 2], 4000
    engine = make_engine(model, golden_tokenizer, 64, speculate=2)
    completions = engine.generate([Request(prompt, 2, seed=seed) for seed in range(num_seeds)])
    counts = Counter(tuple(completion.tokens) for completion in completions)
    with torch.no_grad():
        first = slow_probs(model(torch.tensor([prompt]))[0, -1], Request(prompt))
        second = model(torch.tensor([[*prompt, token] for token in range(8)]))[:, -1]
    assert 0.02 < first[3] < 0.9
    chi_square = 0.0
    for token, logits in enumerate(second):
        for following, prob in enumerate(slow_probs(logits, Request(prompt)).tolist()):
            expected = num_seeds * first[token].item() * prob
            chi_square += (counts[token, following] - expected) ** 2 / expected
    assert chi_square < 113.5  # 63 degrees of freedom


# ---- steps ----


def test_generate_repetitive_text_takes_fewer_steps(golden_tokenizer, monkeypatch):
    engine = Engine(parrot(chain(5, 6, 7, 5)), golden_tokenizer, speculate=4)
    shapes = spy_on_shapes(engine, monkeypatch)
    (completion,) = engine.generate([greedy([5], 25)])
    assert completion.tokens == ([6, 7, 5] * 9)[:25]
    # The 2-gram (5, 6) has occurred before after 4 tokens; from then on all drafts are right.
    assert shapes == [(1, 1)] * 4 + [(1, 5)] * 4 + [(1, 1)]


def test_generate_wrong_drafts_cost_no_tokens(golden_tokenizer, monkeypatch):
    engine = Engine(parrot(chain(3, 4, 5, 6, 7, 8)), golden_tokenizer, speculate=2)
    shapes = spy_on_shapes(engine, monkeypatch)
    (completion,) = engine.generate([greedy([3, 4, 9, 9, 3, 4], 3)])
    assert completion.tokens == [5, 6, 7] and shapes == [(1, 3), (1, 1), (1, 1)]


def test_tool_result_is_read_in_one_step(golden_tokenizer, monkeypatch):
    special, (one, plus, three, four) = golden_tokenizer.special, (golden_tokenizer.encode(c)[0] for c in "1+34")
    call = [special("<|python_start|>"), one, plus, three, special("<|python_end|>")]
    output = [special("<|output_start|>"), four, special("<|output_end|>")]
    model = parrot(chain(5, *call, 0) | chain(output[0], 0) | chain(four, 0) | {output[-1]: 6})
    engine = Engine(model, golden_tokenizer, speculate=4)
    shapes = spy_on_shapes(engine, monkeypatch)
    (completion,) = engine.generate([greedy([5], 9)])
    assert completion.tokens == [*call, *output, 6] and completion.sampled == [True] * 5 + [False] * 3 + [True]
    assert shapes == [(1, 1)] * 5 + [(1, 5)]


def test_speculate_negative_is_an_error(golden_tokenizer):
    with pytest.raises(UserError, match="speculate -1"):
        Engine(parrot({}), golden_tokenizer, speculate=-1)


# ---- shapes ----


@pytest.mark.slow
def test_step_with_drafts_static_shapes_give_the_same_completions(golden_tokenizer):
    model = make_model()
    expected = make_engine(model, golden_tokenizer).generate(REQUESTS)
    engine = make_engine(model, golden_tokenizer, speculate=3)
    engine.decoder.use_static_shapes = True
    for _ in range(2):  # slots used before
        for completion, wanted in zip(engine.generate(REQUESTS), expected, strict=True):
            assert_same(completion, wanted)


@pytest.mark.slow
@pytest.mark.skipif(not hardware.can_compile(torch.device("cpu")), reason="needs a C++ compiler")
def test_step_with_drafts_compiled_equals_eager(golden_tokenizer):
    """Here with one slot, where drafts need a second package. The decoder's tests compile a step of several slots."""
    model = make_model(n_layer=1)
    engine = make_engine(model, golden_tokenizer, 1, compile=True, speculate=3)
    expected = make_engine(model, golden_tokenizer, 1).generate(REQUESTS)
    for completion, wanted in zip(engine.generate(REQUESTS), expected, strict=True):
        assert_same(completion, wanted)
    assert engine.decoder.forward.packages.keys() == {(True, 1), (True, 4)}


@NEEDS_NUMBERS
@pytest.mark.gpu
def test_step_with_drafts_graph_equals_eager_without_drafts(golden_tokenizer):
    model = make_model(device="cuda")
    expected = make_engine(model, golden_tokenizer, 8).generate(REQUESTS)
    engine = make_engine(model, golden_tokenizer, 8, speculate=3)
    for completion, wanted in zip(engine.generate(REQUESTS), expected, strict=True):
        assert_same(completion, wanted)
    assert {T for _, T, *_ in engine.decoder.graphs} == {1, 4}
