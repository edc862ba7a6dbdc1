"""
The parts of the decode step: sampling against a slow reference, weight layouts, refreshed weights, 8-bit weights and
CUDA graphs. That the decoder's logits equal the model's is tested in tests/test_engine.py.

    python -m pytest tests/test_decoder.py
"""

from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from factories import FAMILY, GOLDEN_VOCAB_SIZE, NEEDS_NUMBERS
from test_engine import (
    CONTEXT,
    assert_same,
    check_against_one_pass,
    greedy,
    make_engine,
    make_model,
    prompt_of,
    slow_probs,
)
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat import aot, hardware, packed, slot_attention
from nanochat.engine import Engine
from nanochat.gpt import GPTConfig, norm
from nanochat.loss import softcap
from nanochat.packed import PackedLinear
from nanochat.request import Request, sampling_params
from nanochat.sampling import BatchSampling, RowSampling, SamplingParams, sample

SOFTCAP = GPTConfig().logit_softcap


# ---- sampling ----


def draw(raw_BV, requests, uniform_B):
    """One step of sampling as the engine does it, a row per request: (tokens, log-probabilities)."""
    vocab_size = raw_BV.size(1)
    params = [sampling_params(request, vocab_size) for request in requests]
    rows = RowSampling(
        torch.tensor([row.top_k or vocab_size for row in params]),
        torch.tensor([row.temperature for row in params]),
        torch.tensor([row.top_p for row in params]),
        uniform_B,
    )
    return sample(raw_BV, rows, BatchSampling.of(params, vocab_size), SOFTCAP)


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
RAW = torch.tensor([3.0, -1.0, 20.0, 0.0, 16.0, 17.0, -30.0, 5.0])  # some are changed by the softcap


@pytest.mark.slow
@pytest.mark.parametrize("together", [False, True], ids=["alone", "mixed"])
@pytest.mark.parametrize("raw", [RAW, RAW / 10], ids=["peaked", "flat"])
def test_sample_counts_follow_the_distribution(raw, together):
    """With evenly spaced random numbers, the count of each token is exact within one."""
    num = 1000
    uniform = (torch.arange(num) + 0.5) / num
    groups = [SETTINGS] if together else [[settings] for settings in SETTINGS]
    for group in groups:
        requests = [Request([1], logprobs=True, **settings) for settings in group for _ in range(num)]
        tokens, logprobs = draw(raw.expand(len(requests), -1), requests, uniform.repeat(len(group)))
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


def test_sample_without_logprobs_returns_none():
    assert draw(RAW[None], [Request([1])], torch.tensor([0.5]))[1] is None


@pytest.mark.parametrize("settings", [{"top_k": 2}, {"top_p": 0.9}, {}, {"top_k": 2, "top_p": 0.99}])
@pytest.mark.parametrize("number", [0.0, 1 - 2**-24])  # the extremes of torch.rand
def test_sample_extreme_random_numbers_never_give_an_impossible_token(settings, number):
    raw = torch.full((1, 2048), -2000.0)
    raw[0, [3, 700]] = torch.tensor([50.0, 51.0])
    settings = settings | {"temperature": 0.1}  # e^-300 is 0 in float32
    tokens, logprobs = draw(raw, [Request([1], logprobs=True, **settings)], torch.tensor([number]))
    assert tokens[0] in (3, 700) and logprobs.isfinite().all()


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_sample_non_finite_logits_give_valid_tokens_and_leave_other_rows(settings, value):
    raw = RAW.repeat(3, 1)
    raw[0] = value
    raw[1, 2] = value
    tokens, _ = draw(raw, [Request([1], **settings)] * 3, torch.full((3,), 0.5))
    assert ((tokens >= 0) & (tokens < 8)).all()
    assert tokens[2] == draw(RAW[None], [Request([1], **settings)], torch.tensor([0.5]))[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", [{"top_k": 20}, {"top_k": 20, "top_p": 0.8}, {}, {"top_p": 0.5}])
def test_sample_equal_logits_do_not_depend_on_other_rows(dtype, settings):
    """In half precision many logits are equal; which of them are in the top k, and in what order, depends on k."""
    raw = (torch.randn(64, 4096, generator=torch.Generator().manual_seed(0)) * 2).to(dtype)
    assert all(len(row.unique()) < 4000 for row in raw)
    uniform = torch.rand(64, generator=torch.Generator().manual_seed(1))
    request = Request([1], **settings)
    alone, _ = draw(raw, [request] * 64, uniform)
    if "top_k" in settings:
        assert (raw.gather(1, alone[:, None]) >= raw.topk(20).values[:, -1:]).all()
    for neighbour in ({"top_k": 3000}, {"top_k": 2}, {"top_p": 0.9}, {"temperature": 0.0}, {}):
        tokens, _ = draw(raw, [request] * 63 + [Request([1], **neighbour)], uniform)
        assert torch.equal(tokens[:63], alone[:63])


def test_batch_sampling_contains_only_what_rows_need():
    def batch(*rows):
        return BatchSampling.of([SamplingParams(*row) for row in rows], vocab_size=1000)

    greedy_row, plain, logprobs = (0.0, 50, 0.5, False), (1.0, 0, 1.0, False), (1.0, 0, 1.0, True)
    assert batch(greedy_row) == BatchSampling(num_candidates=1, greedy=True)
    assert batch(plain) == BatchSampling(full_vocab=True)
    assert batch(plain, logprobs) == BatchSampling(full_vocab=True, logprobs=True)
    assert batch((1.0, 5, 1.0, False), (1.0, 50, 1.0, False), (1.0, 40, 1.0, False)).num_candidates == 64
    assert batch((1.0, 1, 0.9, False)) == BatchSampling(num_candidates=2, top_p=True)
    assert batch((1.0, 0, 0.9, False), greedy_row) == BatchSampling(num_candidates=1000, greedy=True, top_p=True)


# ---- weights ----


@pytest.mark.parametrize("num_rows", [1, 2, 33])
@pytest.mark.parametrize("layout", ["plain", "packed", "transposed", "int8"])
def test_packed_linear_every_layout_equals_linear_of_stacked_matrices(layout, num_rows):
    if layout == "packed" and not torch.backends.mkldnn.is_available():
        pytest.skip("packed weights need oneDNN")
    torch.manual_seed(0)
    layers = [nn.Linear(40, outputs, bias=False) for outputs in (24, 7, 1)]
    parts = [layer.weight for layer in layers]
    x = torch.randn(num_rows, 40)
    with torch.inference_mode():
        parts[1].mul_(100)
        parts[2].zero_()
        linear = PackedLinear(layers, torch.float32, layout)
        for _ in range(2):
            weight = torch.cat(parts)
            error = (torch.cat(linear(x), dim=1) - F.linear(x, weight)).abs()
            # 8 bits: each weight is off by at most half a step, and a row's step is its largest weight over 127.
            steps = weight.abs().amax(dim=1) / 127 if layout == "int8" else torch.zeros(32)
            assert (error <= 0.5 * steps * x.abs().sum(dim=1, keepdim=True) + 1e-3).all()
            parts[0].add_(1.0)
            linear.refresh()


def force_choice(monkeypatch, dtype, layout):
    """What decoders choose from now on, whatever is fastest here."""
    monkeypatch.setattr(packed, "choose", lambda *args, **options: packed.Choice(dtype, layout, 1))


def update(model):
    """Changes the weights in place, as an optimizer does."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("max_slots", [1, 8])
@pytest.mark.parametrize("cast", [False, True], ids=["", "cast"])
@pytest.mark.parametrize("layout", ["plain", "transposed", "packed", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_refresh_weights_equals_a_new_engine(dtype, layout, cast, max_slots, golden_tokenizer, monkeypatch):
    force_choice(monkeypatch, torch.bfloat16 if layout == "int8" else dtype, layout)
    model = make_model(dtype=dtype)
    if cast:
        model.cast_weights()
    requests = [greedy(prompt_of(140), 9, logprobs=True), Request(prompt_of(5), 30, top_k=50), Request([1], 9)]
    engine = make_engine(model, golden_tokenizer, max_slots)
    before = engine.generate(requests)
    update(model)
    engine.refresh_weights()
    after = engine.generate(requests)
    assert after != before
    assert after == make_engine(model, golden_tokenizer, max_slots).generate(requests)
    if dtype == torch.float32 and layout != "int8":
        check_against_one_pass(model, requests[0], after[0])


@pytest.mark.parametrize("max_slots", [1, 8])
def test_packed_linear_shares_weights_that_are_being_trained(max_slots, golden_tokenizer):
    model = make_model()
    decoder = Engine(model, golden_tokenizer, max_slots).decoder
    update(model)
    with torch.inference_mode():
        decoder.refresh_weights()
    block, copied = model.transformer.h[1], decoder.model.transformer.h[1]
    shared = [
        (copied.attn.c_proj, block.attn.c_proj),
        (copied.mlp.c_fc, block.mlp.c_fc),
        (copied.mlp.c_proj, block.mlp.c_proj),
        (decoder.model.lm_head, model.lm_head),
    ]
    for layer, original in shared:
        assert layer.weight.data_ptr() == original.weight.data_ptr()


def test_refresh_weights_after_swapping_tensors_writes_to_none_of_them(golden_tokenizer):
    """For example when averaged weights are evaluated and the original tensors are put back."""
    model = make_model()
    engine = make_engine(model, golden_tokenizer)
    own = {name: p.data for name, p in model.named_parameters()}
    before = {name: weight.clone() for name, weight in own.items()}
    for p in model.parameters():
        p.data = p.data * 1.2
    engine.refresh_weights()
    request = greedy(prompt_of(5), logprobs=True)
    check_against_one_pass(model, request, engine.generate([request])[0])
    for name, p in model.named_parameters():
        assert torch.equal(own[name], before[name])
        p.data = own[name]
    engine.refresh_weights()
    check_against_one_pass(model, request, engine.generate([request])[0])


def test_refresh_weights_with_requests_is_an_error(golden_tokenizer):
    engine = make_engine(make_model(), golden_tokenizer)
    engine.add(greedy([1]))
    with pytest.raises(AssertionError, match="old weights"):
        engine.refresh_weights()


@pytest.mark.parametrize("vocab_size", [GOLDEN_VOCAB_SIZE, 70])  # 70 is padded to 128
def test_int8_logprobs_are_close_and_reproducible(golden_tokenizer, vocab_size, monkeypatch):
    """With weights of a trained model's size, log-probabilities change by 0.01 nats on average (of 7)."""
    force_choice(monkeypatch, torch.bfloat16, "int8")
    model = make_model(vocab_size=vocab_size)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.normal_(std=p.size(1) ** -0.5)
    requests = [
        Request([token % vocab_size for token in prompt_of(length)], 60, seed=length, logprobs=True)
        for length in (3, 60, 140)
    ]
    completions = make_engine(model, golden_tokenizer).generate(requests)
    assert completions == make_engine(model, golden_tokenizer).generate(requests)
    differences = []
    for request, completion in zip(requests, completions, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([request.prompt + completion.tokens[:-1]]))[0, len(request.prompt) - 1 :]
        exact = logits.log_softmax(-1)[range(60), completion.tokens]
        differences.append((exact - torch.tensor(completion.logprobs)).abs())
    assert 0 < torch.cat(differences).mean() < 0.02 and torch.cat(differences).max() < 0.2


# ---- static shapes and CUDA graphs ----

MIXED = [
    greedy(prompt_of(1), 40, logprobs=True),
    Request(prompt_of(140), 90, seed=1, logprobs=True),
    Request(prompt_of(7), 12, top_k=50, seed=2, logprobs=True),
    Request(prompt_of(60), 3, top_k=3, top_p=0.5, seed=3, logprobs=True),
    greedy(prompt_of(130), 126, logprobs=True),
]


@pytest.mark.slow
def test_step_static_shapes_give_the_same_completions(golden_tokenizer):
    """The shapes of CUDA graphs: batches with unused slots, and more keys than there are."""
    model = make_model()
    expected = make_engine(model, golden_tokenizer).generate(MIXED)
    engine = make_engine(model, golden_tokenizer)
    engine.decoder.use_static_shapes = True
    for request, completion, wanted in zip(MIXED, engine.generate(MIXED), expected, strict=True):
        assert_same(completion, wanted)
        check_against_one_pass(model, request, completion)
    for completion, wanted in zip(engine.generate(MIXED[::-1]), expected[::-1], strict=True):  # slots used before
        assert_same(completion, wanted)


def test_step_static_shapes_unused_slot_may_have_held_a_longer_sequence(golden_tokenizer):
    """Three slots are decoded as four; the unused one has ended at position 301, and the step reads 256 keys."""
    model = make_model(sequence_len=512, n_layer=1)
    requests = [greedy(prompt_of(5), 6)] * 3 + [greedy(prompt_of(300), 2)]
    engine = make_engine(model, golden_tokenizer, 4)
    engine.decoder.use_static_shapes = True
    assert engine.generate(requests) == make_engine(model, golden_tokenizer, 4).generate(requests)


def engine_on_cuda(tokenizer, family="modern", **options):
    return make_engine(make_model(family, device="cuda"), tokenizer, max_slots=8, **options)


@NEEDS_NUMBERS
@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILY)
def test_step_graph_equals_eager_step(family, golden_tokenizer):
    captured, eager = (engine_on_cuda(golden_tokenizer, family) for _ in range(2))
    eager.decoder.use_graphs = False
    for request, completion, expected in zip(MIXED, captured.generate(MIXED), eager.generate(MIXED), strict=True):
        assert_same(completion, expected)
        check_against_one_pass(captured.model, request, completion)
    assert captured.decoder.graphs and not eager.decoder.graphs
    assert {batch for batch, *_ in captured.decoder.graphs} == {5, 4, 2, 1}  # the number of slots, else powers of two


class SoftmaxInputs(TorchDispatchMode):
    """Records the dtype of whatever is passed through a softmax."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.softmax, torch.ops.aten._softmax):
            self.dtypes.append(args[0].dtype)
        return function(*args, **(kwargs or {}))


@pytest.mark.gpu
def test_int8_on_a_gpu_warns_that_it_is_slower(golden_tokenizer, capsys):
    engine_on_cuda(golden_tokenizer)
    assert not capsys.readouterr().err
    engine_on_cuda(golden_tokenizer, precisions=["int8"])
    assert "it is slower" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("static_shapes", [True, False])
def test_attention_in_bfloat16_keeps_its_scores_in_float32(static_shapes, golden_tokenizer):
    model = make_model(device="cuda", dtype=torch.bfloat16, n_layer=2)
    engine = make_engine(model, golden_tokenizer)
    engine.decoder.use_graphs, engine.decoder.use_static_shapes = False, static_shapes
    engine.add(greedy(prompt_of(1), 5))
    with SoftmaxInputs() as softmax:
        for _ in range(3):
            engine.step()
    assert softmax.dtypes == [torch.float32] * 6


@NEEDS_NUMBERS
@pytest.mark.gpu
def test_step_capturing_a_graph_has_no_side_effects(golden_tokenizer):
    once, always = engine_on_cuda(golden_tokenizer), engine_on_cuda(golden_tokenizer)
    for engine in (once, always):
        for request in MIXED:
            engine.add(request)
    while once.is_busy:
        always.decoder.graphs.clear()  # captured again at each step
        assert once.step() == always.step()
        for window, states in once.decoder.cache.by_window.items():
            assert torch.equal(states, always.decoder.cache.by_window[window])
    assert not always.is_busy


@NEEDS_NUMBERS
@pytest.mark.gpu
def test_reserve_growing_slots_drops_graphs(golden_tokenizer):
    engine = engine_on_cuda(golden_tokenizer)
    short, long = greedy(prompt_of(1), 60, logprobs=True), greedy(prompt_of(100), CONTEXT, logprobs=True)
    first = engine.add(short)
    for _ in range(20):
        engine.step()
    graphs = list(engine.decoder.graphs.values())
    second = engine.add(long)
    engine.step()
    assert not set(graphs) & set(engine.decoder.graphs.values())
    completions = {entry.number: entry.completion for entry in engine.active}
    while engine.is_busy:
        engine.step()
    check_against_one_pass(engine.model, short, completions[first])
    check_against_one_pass(engine.model, long, completions[second])


@NEEDS_NUMBERS
@pytest.mark.gpu
def test_refresh_weights_graphs_read_the_new_weights(golden_tokenizer):
    engine = engine_on_cuda(golden_tokenizer)
    engine.generate(MIXED)
    graphs = dict(engine.decoder.graphs)
    update(engine.model)
    engine.refresh_weights()
    after = engine.generate(MIXED)
    assert engine.decoder.graphs == graphs
    for completion, expected in zip(after, make_engine(engine.model, golden_tokenizer, 8).generate(MIXED), strict=True):
        assert_same(completion, expected)


@pytest.mark.gpu
def test_compilation_that_fails_falls_back_to_the_eager_step(golden_tokenizer, monkeypatch, capsys):
    def fail(graph, inputs):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=fail))
    torch._dynamo.reset()
    engine = engine_on_cuda(golden_tokenizer, compile=True)
    engine.generate(MIXED)
    assert capsys.readouterr().err.count("the decode step is not compiled") == 1
    assert engine.decoder.graphs


@pytest.mark.parametrize("norms_input", [False, True])
def test_multiply_row_equals_the_product_of_the_normed_input(norms_input):
    linear = PackedLinear([nn.Linear(24, 10, bias=False)], torch.float32, "plain", norms_input=norms_input)
    x_BTC = 3 * torch.randn(1, 1, 24, generator=torch.Generator().manual_seed(0))
    expected = F.linear(norm(x_BTC) if norms_input else x_BTC, linear.weight)
    torch.testing.assert_close(linear(x_BTC), expected)
    torch.testing.assert_close(linear._multiply_row(x_BTC), expected)


def test_attention_without_maximum_equals_products():
    generator = torch.Generator().manual_seed(0)
    q_NGD, keys_NSD, values_NSD = (torch.randn(4, size, 16, generator=generator) for size in (3, 50, 50))
    mask_NTS = torch.zeros(4, 1, 50).masked_fill(torch.arange(50) > 30, -torch.inf)
    expected = slot_attention.attend_by_products(q_NGD, keys_NSD, values_NSD, mask_NTS)
    for attend in (slot_attention.attend_without_maximum, slot_attention.attend_by_sums):
        torch.testing.assert_close(attend(q_NGD, keys_NSD, values_NSD, mask_NTS), expected)


# ---- the choice of layouts, and compiled steps ----


def test_choose_weights_in_training_are_shared(golden_tokenizer):
    choice = packed.choose(make_model(), 8, compiled=False)
    assert (choice.dtype, choice.layout) == (torch.float32, "plain")


def test_choose_is_measured_once_per_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    model = make_model().requires_grad_(False)
    choice = packed.choose(model, 8, compiled=False, precisions=["bfloat16"])
    monkeypatch.setattr(packed, "_measure", None)
    assert packed.choose(model, 8, compiled=False, precisions=["bfloat16"]) == choice
    with pytest.raises(TypeError):
        packed.choose(model, 4, compiled=False, precisions=["bfloat16"])
    (file,) = (tmp_path / "measurements").iterdir()
    file.write_text("damaged")
    monkeypatch.undo()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    assert packed.choose(model, 8, compiled=False).dtype == torch.float32


def test_choose_compiled_code_never_uses_packed_weights(monkeypatch):
    model = make_model().requires_grad_(False)
    seen = []
    monkeypatch.setattr(
        packed, "_measure", lambda model, rows, candidates: seen.append(candidates) or (candidates[0], 1)
    )
    monkeypatch.setattr(packed.hardware, "measured", lambda question, measure: measure())
    packed.choose(model, 8, compiled=True, precisions=["bfloat16"])
    assert seen == [["float32 plain", "float32 transposed", "bfloat16 plain", "bfloat16 transposed"]]


def test_choose_warns_if_8_bit_weights_are_slower(monkeypatch, capsys):
    monkeypatch.setattr(packed.hardware, "measured", lambda question, measure: ("float32 plain", 1))
    packed.choose(make_model().requires_grad_(False), 8, compiled=False, precisions=["int8"])
    assert "8-bit weights are not used" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not hardware.can_compile(torch.device("cpu")), reason="needs a C++ compiler")
def test_step_compiled_equals_eager_and_compiles_twice(golden_tokenizer, monkeypatch, tmp_path):
    """Once for a single slot and once for all other numbers of slots; numbers of keys do not matter."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    model = make_model(n_layer=2)
    engine = make_engine(model, golden_tokenizer, compile=True)
    engine.warm_up()
    expected = make_engine(model, golden_tokenizer).generate(MIXED)
    for _ in range(2):
        for request, completion, wanted in zip(MIXED, engine.generate(MIXED), expected, strict=True):
            assert_same(completion, wanted)
            check_against_one_pass(model, request, completion)
        engine.generate(MIXED * 4)
    assert len(list((tmp_path / "compiled").iterdir())) == 2
    update(model)
    engine.refresh_weights()
    for request, completion in zip(MIXED, engine.generate(MIXED), strict=True):
        check_against_one_pass(model, request, completion)
    assert len(list((tmp_path / "compiled").iterdir())) == 2

    monkeypatch.setattr(aot, "compile_package", None)  # a second engine, as in another process, compiles nothing
    for request, completion in zip(
        MIXED, make_engine(model, golden_tokenizer, compile=True).generate(MIXED), strict=True
    ):
        check_against_one_pass(model, request, completion)


@pytest.mark.slow
@pytest.mark.skipif(not hardware.can_compile(torch.device("cpu")), reason="needs a C++ compiler")
def test_step_that_cannot_be_compiled_runs_eagerly(golden_tokenizer, capsys):
    model = make_model(dtype=torch.bfloat16, n_layer=1).requires_grad_(False)
    engine = make_engine(model, golden_tokenizer, compile=True)
    with torch._inductor.config.patch({"cpp.cxx": ("false",), "fx_graph_cache": False}):
        completions = engine.generate(MIXED)
    assert "the decode step is not compiled" in capsys.readouterr().err
    assert [len(completion.tokens) for completion in completions] == [40, 90, 12, 3, 126]
