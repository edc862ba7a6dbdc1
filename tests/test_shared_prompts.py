"""
Prompts that several slots share: completions against a full forward pass and against an engine that does not share, in
every variant of the decode step; what is stored, and what is left behind.

    python -m pytest tests/test_shared_prompts.py
"""

import pytest
import torch
from factories import FAMILY, NEEDS_NUMBERS
from test_engine import (
    assert_nothing_left,
    assert_same,
    check_against_one_pass,
    greedy,
    make_engine,
    make_model,
    prompt_of,
    run,
)

from nanochat import hardware
from nanochat.request import Request
from nanochat.shared_prompts import LayerPrompts, pays_to_share
from nanochat.slot_attention import attend_by_products, attend_by_sums, attend_without_maximum

# 3, 1, 2 and 2 completions of prompts that are longer than the short window (128), empty (the first step reads the last
# token), short and as long as the window.
LENGTHS = (150, 150, 1, 150, 9, 9, 129, 129)


def requests_of(lengths=LENGTHS, max_tokens=9):
    """Completions of different lengths, sampled in different ways."""
    settings = [{"temperature": 0.0}, {"top_k": 5}, {"temperature": 1.5, "top_p": 0.8}, {}]
    return [
        Request(prompt_of(length), max_tokens + i, seed=i, logprobs=True, **settings[i % 4])
        for i, length in enumerate(lengths)
    ]


def check(model, tokenizer, *, requests=None, max_slots=8, static_shapes=False, **options):
    """Checks an engine that shares prompts, and returns it."""
    requests = requests or requests_of()
    engine = make_engine(model, tokenizer, max_slots, share_prompts=True, **options)
    engine.decoder.use_static_shapes |= static_shapes
    expected = make_engine(model, tokenizer, max_slots).generate(requests)
    for request, completion, wanted in zip(requests, engine.generate(requests), expected, strict=True):
        assert_same(completion, wanted)
        check_against_one_pass(model, request, completion)
    assert_nothing_left(engine)
    assert not engine.decoder.prompts.prompts and not engine.decoder.prompts.of_slot
    return engine


@pytest.mark.parametrize("max_slots", [1, 3, 8])
@pytest.mark.parametrize("family", FAMILY)
def test_generate_with_shared_prompts_equals_full_forward_pass(family, max_slots, golden_tokenizer):
    check(make_model(family), golden_tokenizer, max_slots=max_slots)


@pytest.mark.parametrize("n_kv_head", [1, 4])
def test_generate_with_shared_prompts_any_number_of_heads_and_static_shapes(n_kv_head, golden_tokenizer):
    check(make_model(n_kv_head=n_kv_head), golden_tokenizer, static_shapes=True)


def test_generate_with_shared_prompts_rings_that_wrap(golden_tokenizer):
    """Windows of 128: in turn they cover prompt and ring, the ring alone, and the ring after it has wrapped."""
    model = make_model(sequence_len=512, window_pattern="S", n_layer=2)
    check(model, golden_tokenizer, requests=requests_of([100, 100, 300], max_tokens=150))


def test_generate_with_shared_prompts_and_drafts(golden_tokenizer):
    repetitive = [prompt_of(7) * 4] * 3 + [prompt_of(20)]
    requests = [greedy(prompt, 20 + i, logprobs=True) for i, prompt in enumerate(repetitive)]
    check(make_model(), golden_tokenizer, requests=requests, speculate=3)


@pytest.mark.slow
@pytest.mark.skipif(not hardware.can_compile(torch.device("cpu")), reason="needs a C++ compiler")
def test_generate_with_shared_prompts_compiled(golden_tokenizer, monkeypatch, tmp_path):
    """Two packages, as without sharing: for a single slot and for more."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    check(make_model(n_layer=1), golden_tokenizer, compile=True)
    assert len(list((tmp_path / "compiled").iterdir())) == 2


@NEEDS_NUMBERS
@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_generate_with_shared_prompts_captured_graphs(compile, golden_tokenizer):
    engine = check(make_model(device="cuda"), golden_tokenizer, compile=compile)
    assert engine.decoder.graphs


def test_a_prompt_is_stored_once_and_rings_hold_only_what_is_generated(golden_tokenizer):
    engine = make_engine(make_model(), golden_tokenizer, max_slots=16, share_prompts=True)
    engine.generate([Request(prompt_of(200), 20, seed=seed) for seed in range(16)])
    decoder = engine.decoder
    assert decoder.ring_lengths == [128, 128, 128]  # the lowest multiple
    shapes = {window: tuple(cache.shape) for window, cache in decoder.prompts.cache.by_window.items()}
    assert shapes == {128: (2, 1, 2, 2, 129, 8), 256: (2, 2, 2, 2, 257, 8)}  # room for 2 prompts


def test_prompts_without_slots_make_room_for_others(golden_tokenizer):
    """And requests that were cancelled leave nothing."""
    model = make_model()
    engine = make_engine(model, golden_tokenizer, max_slots=3, share_prompts=True)
    requests = {}
    for i in range(12):
        request = greedy(prompt_of(20 + i // 2), 2 + i % 3, seed=i, logprobs=True)
        requests[engine.add(request)] = request
    ended = {}
    for number in (0, 5, 6):
        ended |= {ended_number: completion for ended_number, token, completion in engine.step() if token is None}
        engine.cancel(number)
    ended |= run(engine)
    for number, completion in ended.items():
        check_against_one_pass(model, requests[number], completion)
    assert engine.decoder.prompts.capacity == 4 and not engine.decoder.prompts.prompts


def test_pays_to_share_several_completions_in_many_slots_of_a_gpu():
    cuda = torch.device("cuda")
    assert pays_to_share(num_samples=16, num_slots=256, device=cuda)
    assert not pays_to_share(num_samples=1, num_slots=256, device=cuda)
    assert not pays_to_share(num_samples=16, num_slots=16, device=cuda)
    assert not pays_to_share(num_samples=16, num_slots=256, device=torch.device("cpu"))


def test_attention_to_shared_prompts_is_the_same_in_every_formula():
    generator = torch.Generator().manual_seed(0)
    q, keys, values = (torch.randn(8, size, 16, generator=generator) for size in (2, 30, 30))  # B 4, K 2
    prompt_keys, prompt_values = (torch.randn(4, 20, 16, generator=generator) for _ in range(2))  # U 2
    prompt_of_row, sample_of_row = torch.tensor([0, 1, 0, 0]), torch.tensor([0, 0, 1, 2])
    rows = torch.tensor([[0, 2, 3], [1, 0, 0]])
    prompts = LayerPrompts(prompt_keys, prompt_values, prompt_of_row, sample_of_row, rows)
    mask = torch.zeros(8, 1, 50).masked_fill(torch.rand(8, 1, 50, generator=generator) > 0.7, -torch.inf)

    own_keys, own_values = (
        torch.cat([part.view(2, 2, 20, 16)[prompt_of_row].flatten(0, 1), ring], dim=1)
        for part, ring in ((prompt_keys, keys), (prompt_values, values))
    )
    expected = ((q @ own_keys.transpose(1, 2)) + mask).softmax(dim=-1) @ own_values
    for attend in (attend_by_products, attend_by_sums, attend_without_maximum):
        torch.testing.assert_close(attend(q, keys, values, mask, prompts), expected)
