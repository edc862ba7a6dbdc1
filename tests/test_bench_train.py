"""
The training benchmark at a tiny size: both sides train the same model, shares add up, bad flags are reported.

    python -m pytest tests/test_bench_train.py
"""

import json
from functools import partial
from itertools import islice

import pytest
import torch
from factories import tiny_config

from nanochat import attention, dataset, primer, recipe
from nanochat.dataloader import PretrainLoader
from nanochat.distributed import Dist
from nanochat.gpt import GPT
from nanochat.muon import build_optimizer
from nanochat.tokenizer import Tokenizer
from scripts.bench import __main__ as bench
from scripts.bench import train as bench_train

TINY = ["train", "--device", "cpu", "--depth", "1", "--head-dim", "32", "--vocab-size", "300", "--max-seq-len", "64"]
TINY += ["--device-batch-size", "2", "--total-batch-size", "256", "--no-compile", "--rounds", "1", "--steps", "1"]


@pytest.mark.slow
def test_benchmark_reports_ratios_and_shares(base_dir, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    ratios = bench.main([*TINY, "--attention", "blocks", "--dtype", "bfloat16"])
    assert ratios.keys() == {"tokens/s", "seconds to first step", "bytes of memory"} and min(ratios.values()) > 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["benchmark"] == "train" and last["ratios"] == ratios
    for side in ("nanochat", "plain"):
        shares = [value for key, value in last["results"][side].items() if key.startswith("share")]
        assert len(shares) == 4 and sum(shares) == pytest.approx(1) and last["results"][side]["MFU"] > 0
    assert not list(base_dir.iterdir())  # everything was written to a temporary folder


def test_plain_side_equals_model_and_optimizer():
    config = tiny_config(vocab_size=50, n_kv_head=2)
    x_BT = torch.randint(50, (2, 64), generator=torch.Generator().manual_seed(1))
    flags = bench_train.Flags(compile=False, total_batch_size=128)
    side = bench_train.plain_side(flags, config, torch.device("cpu"), None, iter(()))
    model = GPT(config)
    model.load_state_dict(side.model.state_dict())
    optimizer = build_optimizer(model, recipe.param_groups(config, recipe.Hyperparameters(total_batch_size=128)))
    for _ in range(3):
        loss, expected = side.loss((x_BT, x_BT, 128)), model(x_BT, x_BT)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
        for each, updates in ((loss, side.optimizer), (expected, optimizer)):
            each.backward()
            updates.step()
            updates.zero_grad()
    # The gradient of a scale before a norm is rounding noise, which Adam turns into full steps: lambdas are left out.
    plain, expected = (
        torch.cat([p.detach().flatten() for name, p in each.named_parameters() if "lambda" not in name])
        for each in (side.model, model)
    )
    assert (plain - expected).norm() < 1e-3 * expected.norm()
    assert side.model.transformer.h[0].attn.attend is attention.attend_masked


@pytest.mark.slow
def test_nanochat_side_has_the_loss_curve_of_the_plain_side(base_dir, tmp_path):
    """
    Fifty optimizer steps of pretraining, one layer with a window, in float32 and bfloat16. Deeper models are no use
    here: at depth 4 with such small batches, backout_lambda reaches 1 by step 18 and cancels the residual stream, and
    the spike in the loss that follows turns a difference of 1e-7 into one of 1e-3.
    """
    primer.write_shards(tmp_path / "primer")
    shards = dataset.split_shards(tmp_path / "primer")[0]
    tokenizer = Tokenizer.train(islice(dataset.iterate_texts(shards), 300), 512)
    flags = recipe.RecipeFlags(depth=2, aspect_ratio=32, head_dim=32, max_seq_len=256, window_pattern="SL")
    config = recipe.model_config(flags, 512)
    schedule = partial(recipe.pretrain_schedule, recipe.RecipeFlags(warmup_steps=20, warmdown_ratio=0.5), 50)
    curves = []
    for make_side, dtype in (
        (bench_train.plain_side, "auto"),
        (bench_train.nanochat_side, "float32"),
        (bench_train.nanochat_side, "bfloat16"),
    ):
        row_groups, dist = dataset.RowGroups(shards), Dist(torch.device("cpu"))
        loader = PretrainLoader(tokenizer, row_groups, batch_size=4, sequence_len=256, dist=dist)
        steps = loader.steps(accumulation=1, num_steps=50)
        flags = bench_train.Flags(compile=False, total_batch_size=1024, dtype=dtype, attention="blocks")
        with torch.random.fork_rng():
            side = make_side(flags, config, torch.device("cpu"), tokenizer, steps)
        losses = []
        for i, step in enumerate(side.steps):
            side.optimizer.set_schedule(schedule(i, i / 50))
            loss = side.loss(step.micro_batches[0])
            loss.backward()
            side.optimizer.step()
            side.optimizer.zero_grad()
            losses.append(loss.item())
        curves.append(losses)
    plain, float32, bfloat16 = curves
    assert len(plain) == 50 and plain[-1] < 0.9 * plain[0]
    assert float32 == pytest.approx(plain, rel=1e-5)
    assert bfloat16 == pytest.approx(plain, rel=5e-3)


def test_bad_batch_ends_in_one_line():
    with pytest.raises(SystemExit, match="multiple|whole|batch"):
        bench.main([*TINY, "--total-batch-size", "200"])
