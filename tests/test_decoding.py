"""
The decode step's parts: sampling against a slow reference, the layouts of the weights, new weights, 8 bits, and the
captured graphs of CUDA. That it says what the model says is tests/test_engine.py's.

    python -m pytest tests/test_decoding.py
"""

import pytest
import torch
import torch.nn.functional as F
from factories import FAMILY
from test_engine import (
    CONTEXT,
    V,
    assert_same,
    check_against_one_pass,
    greedy,
    make,
    prompt_of,
    slow_probs,
    unstoppable,
)

from nanochat.decoder import Matrix, Sampling, sample
from nanochat.engine import Engine, Request, Row
from nanochat.gpt import GPTConfig
from nanochat.loss import softcap
from nanochat.tools import ToolUse

SOFTCAP = GPTConfig().logit_softcap
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


# ---- sampling ----


def draw(raw_BV, requests, uniform_B, vocab_size):
    """decoding.sample as the engine calls it: (tokens, log-probabilities) of one step, a row per request."""
    config = GPTConfig(vocab_size=vocab_size)
    settings = [Row(0, request, ToolUse(None), config).settings for request in requests]
    temperature_B, top_k_B, top_p_B = (torch.tensor([row[i] for row in settings]) for i in range(3))
    top_k_B = torch.where(top_k_B > 0, top_k_B, vocab_size)
    return sample(raw_BV, temperature_B, top_k_B, top_p_B, uniform_B, Sampling.of(settings, vocab_size), SOFTCAP)


SETTINGS = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 3},
    {"top_k": 100},
    {"top_p": 0.01},
    {"top_p": 0.5},
    {"top_p": 0.9, "temperature": 2.0},
    {"top_k": 4, "top_p": 0.7},
    {"top_k": 3, "top_p": 0.99, "temperature": 0.7},
]
RAW = torch.tensor([3.0, -1.0, 20.0, 0.0, 16.0, 17.0, -30.0, 5.0])  # the cap matters to some


@pytest.mark.parametrize("together", [False, True], ids=["alone", "mixed"])
@pytest.mark.parametrize("raw", [RAW, RAW / 10], ids=["peaked", "flat"])
def test_samples_follow_the_distribution(raw, together):
    """At random numbers spread evenly each token comes as often as it should, within one."""
    num = 1000
    uniform = (torch.arange(num) + 0.5) / num
    groups = [SETTINGS] if together else [[settings] for settings in SETTINGS]
    for group in groups:
        requests = [Request([1], logprobs=True, **settings) for settings in group for _ in range(num)]
        tokens, logprobs = draw(raw.expand(len(requests), -1), requests, uniform.repeat(len(group)), len(raw))
        for i, settings in enumerate(group):
            rows = slice(i * num, (i + 1) * num)
            if settings == {"temperature": 0.0}:
                assert (tokens[rows] == raw.argmax()).all()
                expected = torch.full((num,), softcap(raw, SOFTCAP).log_softmax(0).max().item())
            else:
                probs = slow_probs(softcap(raw, SOFTCAP), Request([1], **settings))
                counts = torch.bincount(tokens[rows], minlength=len(raw))
                assert ((counts - num * probs).abs() <= 1).all(), settings
                expected = probs[tokens[rows]].log().float()
            torch.testing.assert_close(logprobs[rows], expected, rtol=0, atol=1e-5)


def test_no_log_probabilities_unless_asked_for():
    assert draw(RAW[None], [Request([1])], torch.tensor([0.5]), 8)[1] is None


@pytest.mark.parametrize("settings", [{"top_k": 2}, {"top_p": 0.9}, {}, {"top_k": 2, "top_p": 0.99}])
@pytest.mark.parametrize("number", [0.0, 1 - 2**-24])  # the ends of torch.rand
def test_the_ends_of_the_random_numbers_never_give_an_impossible_token(settings, number):
    raw = torch.full((1, 2048), -2000.0)
    raw[0, [3, 700]] = torch.tensor([50.0, 51.0])
    settings = settings | {"temperature": 0.1}  # e^-300 is 0 in float32
    tokens, logprobs = draw(raw, [Request([1], logprobs=True, **settings)], torch.tensor([number]), 2048)
    assert tokens[0] in (3, 700) and logprobs.isfinite().all()


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_logits_still_give_tokens(settings, value):
    raw = RAW.repeat(3, 1)
    raw[0] = value
    raw[1, 2] = value
    tokens, _ = draw(raw, [Request([1], **settings)] * 3, torch.full((3,), 0.5), 8)
    assert ((tokens >= 0) & (tokens < 8)).all()
    assert tokens[2] == draw(RAW[None], [Request([1], **settings)], torch.tensor([0.5]), 8)[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", [{"top_k": 20}, {"top_k": 20, "top_p": 0.8}, {}, {"top_p": 0.5}])
def test_among_equals_too_the_neighbours_settings_do_not_matter(dtype, settings):
    """Half precision has many: a row's own limit decides which of them it sees, and in what order."""
    raw = (torch.randn(64, 4096, generator=torch.Generator().manual_seed(0)) * 2).to(dtype)
    assert all(len(row.unique()) < 4000 for row in raw)
    uniform = torch.rand(64, generator=torch.Generator().manual_seed(1))
    request = Request([1], **settings)
    alone, _ = draw(raw, [request] * 64, uniform, 4096)
    if "top_k" in settings:
        assert (raw.gather(1, alone[:, None]) >= raw.topk(20).values[:, -1:]).all()
    for neighbour in ({"top_k": 3000}, {"top_k": 2}, {"top_p": 0.9}, {"temperature": 0.0}, {}):
        tokens, _ = draw(raw, [request] * 63 + [Request([1], **neighbour)], uniform, 4096)
        assert torch.equal(tokens[:63], alone[:63])


def test_no_more_is_computed_than_the_rows_need():
    greedy_row, plain, logprobs = (0.0, 50, 0.5, False), (1.0, 0, 1.0, False), (1.0, 0, 1.0, True)
    assert Sampling.of([greedy_row], 1000) == Sampling(greedy=True)
    assert Sampling.of([plain], 1000) == Sampling(everything=True)
    assert Sampling.of([plain, logprobs], 1000) == Sampling(everything=True, logprobs=True)
    assert Sampling.of([(1.0, 5, 1.0, False), (1.0, 50, 1.0, False), (1.0, 40, 1.0, False)], 1000).candidates == (8, 64)
    assert Sampling.of([(1.0, 1, 0.9, False)], 1000) == Sampling(candidates=(1,), top_p=True)
    assert Sampling.of([(1.0, 0, 0.9, False), greedy_row], 1000) == Sampling(True, (1024,), True)


# ---- the weights ----


@pytest.mark.parametrize("num_rows", [1, 2, 33])
@pytest.mark.parametrize("layout", ["plain", "packed", "transposed", "int8"])
def test_products_with_matrices_one_below_the_other(layout, num_rows):
    if layout == "packed" and not torch.backends.mkldnn.is_available():
        pytest.skip("packed weights need oneDNN")
    torch.manual_seed(0)
    parts = [torch.randn(24, 40), torch.randn(7, 40) * 100, torch.zeros(1, 40)]
    x = torch.randn(num_rows, 40)
    with torch.inference_mode():
        matrix = Matrix(lambda: parts, torch.float32, layout)
        for _ in range(2):
            weight = torch.cat(parts)
            error = (matrix(x) - F.linear(x, weight)).abs()
            # 8 bits: each weight is off by at most half a step, the steps being the row's largest over 127.
            steps = weight.abs().amax(dim=1) / 127 if layout == "int8" else torch.zeros(32)
            assert (error <= 0.5 * steps * x.abs().sum(dim=1, keepdim=True) + 1e-3).all()
            parts[0].add_(1.0)
            matrix.refresh()


def update(model):
    """As an optimizer does, in place."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)


@pytest.mark.parametrize("num_rows", [1, 8])
@pytest.mark.parametrize("cast", [False, True], ids=["", "cast"])
@pytest.mark.parametrize("int8", [False, True], ids=["", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_new_weights_are_a_new_engines(dtype, int8, cast, num_rows, golden_tokenizer):
    model = make(dtype=dtype)
    if cast:
        model.cast_weights()
    requests = [greedy(prompt_of(140), 9, logprobs=True), Request(prompt_of(5), 30, top_k=50), Request([1], 9)]
    it = unstoppable(model, golden_tokenizer, num_rows, int8=int8)
    before = it.generate(requests)
    update(model)
    it.refresh_weights()
    after = it.generate(requests)
    assert after != before
    assert after == unstoppable(model, golden_tokenizer, num_rows, int8=int8).generate(requests)
    if dtype == torch.float32 and not int8:
        check_against_one_pass(model, requests[0], after[0])


@pytest.mark.parametrize("num_rows", [1, 8])
def test_weights_that_are_being_trained_are_not_copied(num_rows, golden_tokenizer):
    model = make()
    decoder = Engine(model, golden_tokenizer, num_rows).decoder
    update(model)
    with torch.inference_mode():
        decoder.refresh_weights()
    block, layer = model.transformer.h[1], decoder.layers[1]
    shared = [
        (layer.attn_out, block.attn.c_proj),
        (layer.mlp_in, block.mlp.c_fc),
        (layer.mlp_out, block.mlp.c_proj),
        (decoder.head, model.lm_head),
    ]
    for matrix, linear in shared:
        assert matrix.weight.data_ptr() == linear.weight.data_ptr()


def test_weights_that_are_put_in_the_place_of_others(golden_tokenizer):
    """As when an average of the weights is tried out and taken back: nothing is written into the ones set aside."""
    model = make()
    it = unstoppable(model, golden_tokenizer)
    own = {name: p.data for name, p in model.named_parameters()}
    before = {name: weight.clone() for name, weight in own.items()}
    for p in model.parameters():
        p.data = p.data * 1.2
    it.refresh_weights()
    request = greedy(prompt_of(5), logprobs=True)
    check_against_one_pass(model, request, it.generate([request])[0])
    for name, p in model.named_parameters():
        assert torch.equal(own[name], before[name])
        p.data = own[name]
    it.refresh_weights()
    check_against_one_pass(model, request, it.generate([request])[0])


def test_new_weights_under_way_are_refused(golden_tokenizer):
    it = unstoppable(make(), golden_tokenizer)
    it.add(greedy([1]))
    with pytest.raises(AssertionError, match="old weights"):
        it.refresh_weights()


@pytest.mark.parametrize("vocab_size", [V, 70])  # 70 is padded to 128
def test_eight_bits_are_close_and_repeatable(golden_tokenizer, vocab_size):
    """With weights of a trained model's size, log-probabilities change by 0.01 nats on average (of 7)."""
    model = make(vocab_size=vocab_size)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.normal_(std=p.size(1) ** -0.5)
    requests = [
        Request([token % vocab_size for token in prompt_of(length)], 60, seed=length, logprobs=True)
        for length in (3, 60, 140)
    ]
    completions = unstoppable(model, golden_tokenizer, int8=True).generate(requests)
    assert completions == unstoppable(model, golden_tokenizer, int8=True).generate(requests)
    differences = []
    for request, completion in zip(requests, completions, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([request.prompt + completion.tokens[:-1]]))[0, len(request.prompt) - 1 :]
        exact = logits.log_softmax(-1)[range(60), completion.tokens]
        differences.append((exact - torch.tensor(completion.logprobs)).abs())
    assert 0 < torch.cat(differences).mean() < 0.02 and torch.cat(differences).max() < 0.2


# ---- captured graphs ----

MIXED = [
    greedy(prompt_of(1), 40, logprobs=True),
    Request(prompt_of(140), 90, seed=1, logprobs=True),
    Request(prompt_of(7), 12, top_k=50, seed=2, logprobs=True),
    Request(prompt_of(60), 3, top_k=3, top_p=0.5, seed=3, logprobs=True),
    greedy(prompt_of(130), 126, logprobs=True),
]


def test_a_step_of_static_shapes_says_the_same(golden_tokenizer, monkeypatch):
    """As captured graphs run: with slots that nobody uses, and over all keys that there may be."""
    model = make()
    expected = unstoppable(model, golden_tokenizer).generate(MIXED)
    it = unstoppable(model, golden_tokenizer)
    step, batches = it.decoder._step, set()

    def static_step(num_slots, num_keys, shortest, sampling):
        batches.add(batch := min(1 << (num_slots - 1).bit_length(), it.decoder.num_slots))
        step(batch, it.decoder.length, 0, sampling)

    monkeypatch.setattr(it.decoder, "_step", static_step)
    for request, completion, wanted in zip(MIXED, it.generate(MIXED), expected, strict=True):
        assert_same(completion, wanted)
        check_against_one_pass(model, request, completion)
    assert batches == {5, 4, 2, 1}
    for completion, wanted in zip(it.generate(MIXED[::-1]), expected[::-1], strict=True):  # in slots that ran along
        assert_same(completion, wanted)


def engine_on_cuda(tokenizer, vintage="modern", num_rows=8, int8=False):
    return unstoppable(make(vintage).cuda(), tokenizer, num_rows, int8=int8)


@needs_cuda
@pytest.mark.parametrize("int8", [False, True], ids=["", "int8"])
@pytest.mark.parametrize("vintage", FAMILY)
def test_replaying_a_graph_equals_the_step(vintage, int8, golden_tokenizer, monkeypatch):
    captured, eager = (engine_on_cuda(golden_tokenizer, vintage, int8=int8) for _ in range(2))
    monkeypatch.setattr(
        eager.decoder, "_replay", lambda batch, num_keys, sampling: eager.decoder._step(batch, num_keys, 0, sampling)
    )
    for request, completion, expected in zip(MIXED, captured.generate(MIXED), eager.generate(MIXED), strict=True):
        assert_same(completion, expected)
        if not int8:
            check_against_one_pass(captured.model, request, completion)
    assert captured.decoder.graphs and not eager.decoder.graphs
    assert {batch for batch, *_ in captured.decoder.graphs} == {5, 4, 2, 1}  # the slots' number, else powers of two


@needs_cuda
def test_capturing_a_graph_changes_nothing(golden_tokenizer):
    once, always = engine_on_cuda(golden_tokenizer), engine_on_cuda(golden_tokenizer)
    for it in (once, always):
        for request in MIXED:
            it.add(request)
    while once.is_busy:
        always.decoder.graphs.clear()  # captured anew at each step
        assert once.step() == always.step()
        assert [it.decoder.positions_R[: len(it.rows)].tolist() for it in (once, always)] == [
            [row.position for row in once.rows]
        ] * 2
        torch.testing.assert_close(once.decoder.previous_RC, always.decoder.previous_RC, rtol=0, atol=0)
    assert not always.is_busy


@needs_cuda
def test_growing_slots_drop_their_graphs(golden_tokenizer):
    it = engine_on_cuda(golden_tokenizer)
    short, long = greedy(prompt_of(1), 60, logprobs=True), greedy(prompt_of(100), CONTEXT, logprobs=True)
    first = it.add(short)
    for _ in range(20):
        it.step()
    graphs = list(it.decoder.graphs.values())
    second = it.add(long)
    it.step()
    assert not set(graphs) & set(it.decoder.graphs.values())
    rows = {row.number: row.completion for row in it.rows}
    while it.is_busy:
        it.step()
    check_against_one_pass(it.model, short, rows[first])
    check_against_one_pass(it.model, long, rows[second])


@needs_cuda
def test_graphs_read_new_weights(golden_tokenizer):
    for int8 in (False, True):
        it = engine_on_cuda(golden_tokenizer, int8=int8)
        it.generate(MIXED)
        graphs = dict(it.decoder.graphs)
        update(it.model)
        it.refresh_weights()
        after = it.generate(MIXED)
        assert it.decoder.graphs == graphs
        for completion, expected in zip(
            after, unstoppable(it.model, golden_tokenizer, 8, int8=int8).generate(MIXED), strict=True
        ):
            assert_same(completion, expected)
