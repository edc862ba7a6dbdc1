"""
The generation benchmark: its baselines generate what the engine generates, and it reports a ratio for each of them.

    python -m pytest tests/test_bench_infer.py
"""

import json

import pytest
import torch
from factories import tiny_engine, tiny_gpt

from nanochat.request import Request
from scripts.bench import __main__ as bench
from scripts.bench.infer import NO_SPECIAL_TOKENS
from scripts.bench.plain import PlainCache, generate_like_nanochat, generate_static

PROMPT = [5, 6, 7, 8, 9]


@pytest.mark.parametrize("num_rows", [1, 3])
def test_baselines_and_engine_generate_the_same_greedy_tokens(golden_tokenizer, num_rows):
    model = tiny_gpt().requires_grad_(False)
    request = Request(PROMPT, max_tokens=12, temperature=0.0)
    expected = tiny_engine(model, golden_tokenizer).generate([request])[0].tokens
    assert generate_like_nanochat(model, NO_SPECIAL_TOKENS, request, num_rows) == [expected] * num_rows
    assert generate_static(model, request, num_rows) == [[token] * num_rows for token in expected]


def test_rows_of_one_prompt_are_sampled_apart():
    model = tiny_gpt().requires_grad_(False)
    torch.manual_seed(0)
    rows = generate_like_nanochat(model, NO_SPECIAL_TOKENS, Request(PROMPT, max_tokens=12, top_k=50), 4)
    assert [len(tokens) for tokens in rows] == [12] * 4
    assert len({tuple(tokens) for tokens in rows}) == 4


def test_end_token_and_tool_output_end_and_change_a_row(golden_tokenizer, monkeypatch):
    special = golden_tokenizer.special
    call = [special("<|python_start|>"), *golden_tokenizer.encode("2+3"), special("<|python_end|>")]
    result = [special("<|output_start|>"), *golden_tokenizer.encode("5"), special("<|output_end|>")]
    end = special("<|assistant_end|>")
    # Row 0 calls the calculator: what it would sample during the result is replaced. Row 1 ends at once.
    scripts = iter([*call, *[1] * len(result), end])

    def sample_next(logits_BV, temperature, top_k):
        return torch.tensor([[next(scripts)], [end]])

    monkeypatch.setattr("scripts.bench.plain.sample_next", sample_next)
    model = tiny_gpt().requires_grad_(False)
    rows = generate_like_nanochat(model, golden_tokenizer, Request(PROMPT, max_tokens=30), 2)
    assert rows == [[*call, *result, end], [end]]


def test_copied_cache_continues_as_one_that_every_row_has_read():
    model = tiny_gpt().requires_grad_(False)
    prompt = torch.tensor([PROMPT])
    one_row, all_rows = PlainCache(model, 1, len(PROMPT)), PlainCache(model, 2, 10)
    one_row.read(prompt)
    all_rows.read(prompt.repeat(2, 1))
    next_tokens = torch.tensor([[3], [4]])
    expected = all_rows.read(next_tokens)
    torch.testing.assert_close(one_row.copy_for(2, 10).read(next_tokens), expected)


@pytest.mark.slow
def test_benchmark_reports_a_ratio_for_each_baseline_and_batch_size(capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    sizes = "--depth 1 --head-dim 32 --vocab-size 300 --max-seq-len 64 --prompt-tokens 8 --max-tokens 4"
    ratios = bench.main(["infer", *sizes.split(), "--batch-sizes", "1,2", "--rounds", "1", "--device", "cpu", "--int8"])
    assert ratios.keys() == {"nanochat 1", "static 1", "nanochat 2", "static 2"} and min(ratios.values()) > 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    speeds = last["tokens_per_second"]
    assert last["ratios"] == ratios and len(speeds) == 6 and "engine, 8-bit weights" in speeds
    fastest = max(speeds["nanochat, float32"]["2"], speeds["nanochat, bfloat16"]["2"])
    assert ratios["nanochat 2"] == pytest.approx(speeds["engine"]["2"] / fastest, abs=1e-3)
