"""
The engine: cached, chunked and batched generation against a full forward pass per token; schedules, sampling, tools.

    python -m pytest tests/test_engine.py
"""

import random
from types import SimpleNamespace

import pytest
import torch
from conftest import golden

from nanochat import checkpoint_manager, engine
from nanochat.checkpoint_manager import CheckpointDir
from nanochat.common import UserError
from nanochat.engine import Completion, Engine, KVCache, Request
from nanochat.gpt import GPT, GPTConfig

CPU = torch.device("cpu")
CONTEXT = 256  # its short window is 128
V = 1024  # of the golden tokenizer


def make(vintage="modern", window_pattern="SL"):
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(CONTEXT, V, 3, n_head=4, n_kv_head=2, n_embd=32, window_pattern=window_pattern, vintage=vintage)
    )
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


@pytest.fixture(scope="module", params=["modern", "classic"])
def model(request):
    return make(request.param)


@pytest.fixture(scope="module")
def modern():
    return make()


def prompt_of(length, seed=0):
    return random.Random(f"{seed} {length}").choices(range(1000), k=length)


@torch.no_grad()
def naive_generate(model, prompt, num_tokens):
    """The slow reference: no cache, a forward pass over everything for each greedy token."""
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def unstoppable(model, tokenizer, num_rows=32):
    """Random weights say special tokens too: here they end nothing."""
    it = Engine(model, tokenizer, num_rows)
    it.stop_tokens = set()
    return it


def greedy(prompt, max_tokens=12):
    return Request(prompt, max_tokens, temperature=0.0)


# ---- the cache ----


@pytest.mark.parametrize("chunk", [1, 7, 64, 200])
def test_logits_do_not_depend_on_how_a_text_is_fed(model, chunk):
    ids_BT = torch.tensor([prompt_of(200, seed) for seed in range(2)])
    cache = KVCache(model.config, 2, 200, CPU, torch.float32)
    pieces = []
    with torch.no_grad():
        for piece in ids_BT.split(chunk, dim=1):
            cache.begin(0, 2, piece.size(1))
            pieces.append(model(piece, cache=cache))
            cache.end()
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids_BT), rtol=0, atol=1e-4)
    assert cache.lengths == [200, 200]


def test_a_copied_row_goes_on_as_the_original(modern):
    prompt = torch.tensor([prompt_of(150)])
    cache = KVCache(modern.config, 3, 160, CPU, torch.float32)
    with torch.no_grad():
        for rows, ids in (((1, 2), prompt), ((0, 1), torch.tensor([[5]]))):  # row 0 holds something else first
            cache.begin(*rows, ids.size(1))
            modern(ids, cache=cache)
            cache.end()
        cache.copy(1, 0)
        cache.copy(1, 2)
        cache.begin(0, 3, 1)
        logits = modern(torch.tensor([[7]] * 3), cache=cache)
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(logits[2], logits[1], rtol=0, atol=1e-5)


def test_a_cleared_row_forgets(modern, golden_tokenizer):
    prompts = [prompt_of(150), prompt_of(3), prompt_of(140)]
    completions = unstoppable(modern, golden_tokenizer, num_rows=1).generate([greedy(p) for p in prompts])
    assert [c.tokens for c in completions] == [naive_generate(modern, p, 12) for p in prompts]


# ---- against the naive reference ----


@pytest.mark.parametrize("chunk", [1, 3, 100, 512])
def test_prompts_of_all_lengths_together_equal_the_naive_generation(model, golden_tokenizer, monkeypatch, chunk):
    monkeypatch.setattr(engine, "PREFILL_CHUNK", chunk)
    lengths = [1, 2, 5, 127, 129, 200, CONTEXT - 12] if chunk > 1 else [1, 5, 140]
    requests = [greedy(prompt_of(length)) for length in lengths]
    completions = unstoppable(model, golden_tokenizer).generate(requests)
    for request, completion in zip(requests, completions, strict=True):
        assert completion.tokens == naive_generate(model, request.prompt, 12)
        assert completion.sampled == [True] * 12 and completion.finish == "length"


def test_every_window_full(golden_tokenizer):
    model = make(window_pattern="L")
    (completion,) = unstoppable(model, golden_tokenizer).generate([greedy(prompt_of(180))])
    assert completion.tokens == naive_generate(model, prompt_of(180), 12)


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
    model = CheckpointDir("base", "classic").load().build_model(CPU, torch.float32)
    (completion,) = unstoppable(model, golden_tokenizer).generate([greedy(expected["prompt"], len(expected["greedy"]))])
    assert completion.tokens == expected["greedy"]


# ---- rows come and go ----


def random_requests(rng, num_requests):
    return [
        Request(
            prompt_of(rng.choice([1, 2, 9, 60, 150]), rng.randrange(3)),
            max_tokens=rng.randrange(1, 20),
            temperature=rng.choice([0.0, 0.7, 1.0]),
            top_k=rng.choice([0, 1, 5, 5000]),
            seed=rng.randrange(3),
        )
        for _ in range(num_requests)
    ]


@pytest.mark.parametrize("seed", range(4))
def test_a_text_does_not_depend_on_its_neighbours(modern, golden_tokenizer, seed):
    rng = random.Random(seed)
    requests = random_requests(rng, 9)
    stop_tokens = set(range(0, V, 15))  # a text in fifteen tokens ends: at different times

    def generate(num_rows, requests):
        it = Engine(modern, golden_tokenizer, num_rows)
        it.stop_tokens = stop_tokens
        return it.generate(requests)

    alone = [generate(1, [request])[0] for request in requests]
    assert {"stop", "length"} <= {completion.finish for completion in alone}
    for num_rows in (1, 3, 50):
        assert generate(num_rows, requests) == alone
    order = rng.sample(range(len(requests)), len(requests))
    assert generate(2, [requests[i] for i in order]) == [alone[i] for i in order]


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


def test_no_requests_no_completions(modern, golden_tokenizer):
    assert Engine(modern, golden_tokenizer).generate([]) == []


def test_the_callers_training_goes_on(modern, golden_tokenizer):
    unstoppable(modern, golden_tokenizer).generate([greedy([1, 2])])
    loss = modern(torch.tensor([[1, 2]]), torch.tensor([[2, 3]]))
    assert loss.requires_grad


# ---- ends ----


@pytest.mark.parametrize(
    "length, max_tokens, num_tokens, finish",
    [
        (CONTEXT, 10, 1, "context"),
        (CONTEXT, 1, 1, "length"),
        (CONTEXT - 2, 10, 3, "context"),
        (CONTEXT - 2, 3, 3, "length"),
        (1, 10_000, CONTEXT, "context"),
    ],
)
def test_never_past_the_context(modern, golden_tokenizer, length, max_tokens, num_tokens, finish):
    (completion,) = unstoppable(modern, golden_tokenizer).generate([greedy(prompt_of(length), max_tokens)])
    assert (len(completion.tokens), completion.finish) == (num_tokens, finish)
    assert completion.tokens[:3] == naive_generate(modern, prompt_of(length), num_tokens if num_tokens < 4 else 3)[:3]


@pytest.mark.parametrize(
    "request_, words",
    [
        (Request([]), "0 tokens"),
        (Request([1] * (CONTEXT + 1)), f"{CONTEXT + 1} tokens"),
        (Request([1], max_tokens=0), "max_tokens"),
        (Request([1], temperature=-1.0), "temperature"),
        (Request([1], top_k=-1), "top_k"),
    ],
)
def test_requests_that_cannot_be_served(modern, golden_tokenizer, request_, words):
    with pytest.raises(UserError, match=words) as caught:
        Engine(modern, golden_tokenizer).generate([Request([1]), request_])
    assert "\n" not in str(caught.value)


# ---- sampling ----


def test_equal_prompts_differ_from_the_first_token_on(modern, golden_tokenizer):
    requests = [Request(prompt_of(5), 4, seed=seed) for seed in range(16)]
    texts = [tuple(c.tokens) for c in unstoppable(modern, golden_tokenizer).generate(requests)]
    assert len({text[0] for text in texts}) > 4
    assert len(set(texts)) == 16


def test_the_likeliest_one_token_is_the_greedy_one(modern, golden_tokenizer):
    requests = [Request(prompt_of(5), 10, temperature, top_k) for temperature, top_k in ((0.0, 0), (1.0, 1), (1e-4, 0))]
    first, *others = unstoppable(modern, golden_tokenizer).generate(requests)
    assert all(other.tokens == first.tokens for other in others)


def test_only_the_k_likeliest_are_sampled(modern, golden_tokenizer):
    prompt = prompt_of(5)
    requests = [Request(prompt, 8, temperature=2.0, top_k=3, seed=seed) for seed in range(4)]
    for completion in unstoppable(modern, golden_tokenizer).generate(requests):
        with torch.no_grad():
            logits_TV = modern(torch.tensor([prompt + completion.tokens]))[0, len(prompt) - 1 :]
        for token, logits in zip(completion.tokens, logits_TV, strict=False):
            assert token in logits.topk(3).indices


@pytest.mark.parametrize("temperature, top_k", [(1.0, 0), (0.5, 0), (2.0, 3)])
def test_samples_follow_the_distribution(temperature, top_k):
    num_samples = 4000
    logits = torch.tensor([1.0, -1.0, 2.0, 0.0, 1.5])
    rows = [
        SimpleNamespace(request=Request([1], 1, temperature, top_k), random=random.Random(seed))
        for seed in range(num_samples)
    ]
    sampled = engine.sample(logits.expand(num_samples, -1), rows)
    scaled = logits / temperature
    if top_k:
        scaled[scaled < scaled.topk(top_k).values[-1]] = -torch.inf
    expected = scaled.softmax(0)
    seen = torch.bincount(torch.tensor(sampled), minlength=5) / num_samples
    assert ((seen - expected).abs() <= 4 * (expected * (1 - expected) / num_samples).sqrt()).all()


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_the_ends_of_the_random_numbers_never_give_an_impossible_token(number):
    """1 - 2^-53 is 1 in float32: past the last token, an impossible one here."""
    generator = SimpleNamespace(random=lambda: number, getrandbits=lambda bits: int(number * 2**bits))
    row = SimpleNamespace(request=Request([1], 1, top_k=2), random=generator)
    assert engine.sample(torch.tensor([[0.0, 5.0, 0.0, 6.0, 0.0]]), [row])[0] in (1, 3)


# ---- tools, and what it costs ----


class Parrot:
    """A stand-in for the model that looks up the next token by the last one."""

    config = GPTConfig(64, V, n_layer=1, n_head=1, n_kv_head=1, n_embd=32)
    device, dtype = CPU, torch.float32

    def __init__(self, next_tokens):
        self.next_tokens = next_tokens
        self.passes = []  # shape of each forward pass

    def hidden(self, idx_BT, cache):
        self.passes.append(tuple(idx_BT.shape))
        return idx_BT[..., None]

    def logits(self, hidden_B1):
        wanted_B = torch.tensor([self.next_tokens[int(token)] for token in hidden_B1[..., 0]])
        return torch.nn.functional.one_hot(wanted_B, V).float()


def chain(*tokens):
    """token → the one that follows it."""
    return dict(zip(tokens, tokens[1:], strict=False))


def test_a_result_is_forced_into_the_row(golden_tokenizer):
    special, (one, plus, three, four) = golden_tokenizer.special, (golden_tokenizer.encode(c)[0] for c in "1+34")
    call = [special("<|python_start|>"), one, plus, three, special("<|python_end|>")]
    output = [special("<|output_start|>"), four, special("<|output_end|>")]
    # After python_end, and within the output, the model itself would say something else: 0.
    next_tokens = chain(5, *call, 0) | chain(output[0], 0) | chain(four, 0)
    next_tokens |= chain(output[-1], 6, special("<|assistant_end|>"))
    parrot = Parrot(next_tokens)
    (completion,) = Engine(parrot, golden_tokenizer).generate([greedy([5], 30)])
    assert completion == Completion([*call, *output, 6], [True] * 5 + [False] * 3 + [True], "stop")


@pytest.mark.parametrize("max_tokens", [6, 7])
def test_forced_tokens_count(golden_tokenizer, max_tokens):
    special, (one,) = golden_tokenizer.special, golden_tokenizer.encode("1")
    call = [special("<|python_start|>"), one, special("<|python_end|>")]
    output = [special("<|output_start|>"), one, special("<|output_end|>")]
    next_tokens = chain(5, *call, 0) | chain(output[0], 0) | {output[-1]: 6, 6: 6}
    next_tokens[one] = call[-1]
    (completion,) = Engine(Parrot(next_tokens), golden_tokenizer).generate([greedy([5], max_tokens)])
    assert completion.tokens == [*call, *output, 6][:max_tokens]
    assert completion.finish == "length"


@pytest.mark.parametrize("expression", ["+", "2^", ""])
def test_without_a_result_nothing_is_forced(golden_tokenizer, expression):
    special = golden_tokenizer.special
    call = [special("<|python_start|>"), *golden_tokenizer.encode(expression), special("<|python_end|>")]
    (completion,) = Engine(Parrot(chain(5, *call, 6, golden_tokenizer.bos)), golden_tokenizer).generate([greedy([5])])
    assert completion == Completion([*call, 6], [True] * len(call + [6]), "stop")


def test_a_prompt_is_no_tool_call(golden_tokenizer):
    special, (one,) = golden_tokenizer.special, golden_tokenizer.encode("1")
    parrot = Parrot({one: special("<|python_end|>"), special("<|python_end|>"): special("<|assistant_end|>")})
    (completion,) = Engine(parrot, golden_tokenizer).generate([greedy([special("<|python_start|>"), one])])
    assert completion.tokens == [special("<|python_end|>")] and completion.sampled == [True]


@pytest.mark.parametrize("end", ["<|assistant_end|>", "<|bos|>"])
def test_the_end_token_is_not_part_of_the_text(golden_tokenizer, end):
    parrot = Parrot(chain(5, 6, 7, golden_tokenizer.special(end)))
    (completion,) = Engine(parrot, golden_tokenizer).generate([greedy([5], 30)])
    assert completion == Completion([6, 7], [True, True], "stop")
    assert parrot.passes == [(1, 1), (1, 1), (1, 1)]


def test_no_pass_after_the_last_token_and_one_prefill_for_equal_prompts(golden_tokenizer):
    parrot = Parrot({5: 5})
    Engine(parrot, golden_tokenizer).generate([greedy([5, 5], 4)] * 3)
    assert parrot.passes == [(1, 2)] + [(3, 1)] * 3


def test_rows_that_have_ended_cost_nothing(golden_tokenizer):
    parrot = Parrot({5: 5, 6: 6})
    Engine(parrot, golden_tokenizer, num_rows=2).generate([greedy([5], 2), greedy([6], 5), greedy([5, 5], 2)])
    prefills, decodes = [(1, 1), (1, 1), (1, 2)], [(2, 1), (2, 1), (1, 1), (1, 1)]
    assert sorted(parrot.passes) == sorted(prefills + decodes)


def test_sample_prompts_prints_what_fits(golden_tokenizer, capsys):
    lengths = {text: 1 + len(golden_tokenizer.encode(text)) for text in engine.SAMPLE_PROMPTS}
    context = sorted(lengths.values())[2]
    model = GPT.create(GPTConfig(context, V, n_layer=1, n_head=1, n_kv_head=1, n_embd=32))
    engine.sample_prompts(Engine(model, golden_tokenizer), max_tokens=2)
    lines = capsys.readouterr().out.splitlines()
    fitting = [text for text, length in lengths.items() if length <= context]
    assert len(fitting) >= 3
    assert [line.split(" → ")[0].strip() for line in lines] == [repr(text) for text in fitting]
