"""
The training benchmark at its smallest: both sides train, the parts add up, and what cannot be is said.

    python -m pytest tests/test_bench_train.py
"""

import json
import shutil
from itertools import islice

import pytest
import torch

from nanochat import attention, dataset, recipe
from nanochat.dataloader import PretrainLoader, pretrain_steps
from nanochat.gpt import GPT, GPTConfig
from nanochat.muon import build_optimizer
from nanochat.primer import documents as primer
from nanochat.tokenizer import Tokenizer
from scripts import bench
from scripts.bench import train as bench_train

TINY = ["train", "--device", "cpu", "--depth", "1", "--head-dim", "32", "--vocab-size", "300", "--max-seq-len", "64"]
TINY += ["--device-batch-size", "2", "--total-batch-size", "256", "--no-compile", "--rounds", "1", "--steps", "1"]


def test_it_compares_with_the_plain_code(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    ratios = bench.main([*TINY, "--attention", "blocks", "--dtype", "bfloat16"])
    assert ratios.keys() == {"tokens/s", "seconds to first step", "bytes of memory"} and min(ratios.values()) > 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["benchmark"] == "train" and last["ratios"] == ratios
    for side in ("nanochat", "plain"):
        shares = [value for key, value in last["results"][side].items() if key.startswith("share")]
        assert len(shares) == 5 and sum(shares) == pytest.approx(1) and last["results"][side]["MFU"] > 0
    assert not list(tmp_path.iterdir())  # it leaves nothing behind


def test_the_plain_code_computes_the_same(monkeypatch):
    config = GPTConfig(64, 50, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)
    x_BT = torch.randint(50, (2, 64), generator=torch.Generator().manual_seed(1))
    flags, weights = bench_train.Flags(compile=False, total_batch_size=128), []
    side = bench_train.plain(flags, config, torch.device("cpu"), None, iter(()))
    model = GPT(config)
    model.load_state_dict(side.model.state_dict())
    settings = bench_train.Settings(total_batch_size=128)
    optimizer = build_optimizer(model, settings.rates(), settings.batch_factor)
    for _ in range(3):
        loss, expected = side.loss((x_BT, x_BT, 128)), model(x_BT, x_BT)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
        for each, updates in ((loss, side.optimizer), (expected, optimizer)):
            each.backward()
            updates.step()
            updates.zero_grad()
    for m in (side.model, model):  # a scale before a norm has no gradient but rounding, which Adam makes steps of
        weights.append(torch.cat([p.detach().flatten() for name, p in m.named_parameters() if "lambda" not in name]))
    assert (weights[0] - weights[1]).norm() < 1e-3 * weights[1].norm()
    assert side.model.transformer.h[0].attn.attend is attention.attend_masked


def test_the_fast_path_learns_as_the_plain_one(tmp_path, monkeypatch):
    """
    Fifty updates of pretraining, one layer with a window, float32 and bfloat16. Not deeper: at depth 4 and such small
    batches backout_lambda runs to 1 by update 18 and cancels the residual stream; the spike in the loss that follows
    makes of a difference of 1e-7 one of 1e-3.
    """
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    primer.write_shards(tmp_path / "primer")
    shards = dataset.split_shards(tmp_path / "primer")[0]
    tokenizer = Tokenizer.train(islice(dataset.iterate_texts(shards), 300), 512)
    config = recipe.model_config(2, 512, 32, 32, 256, "SL")
    curves = []
    for make_side, dtype in ((bench_train.plain, ""), (bench_train.ours, "float32"), (bench_train.ours, "bfloat16")):
        steps = pretrain_steps(PretrainLoader(tokenizer, dataset.RowGroups(shards), 4, 256), 1, 50)
        flags = bench_train.Flags(compile=False, total_batch_size=1024, dtype=dtype, attention="blocks")
        with torch.random.fork_rng():
            side, losses = make_side(flags, config, torch.device("cpu"), tokenizer, steps), []
        for i, step in enumerate(side.steps):
            recipe.pretrain_schedule(side.optimizer, i, 50, warmup_steps=20, warmdown_ratio=0.5, final_frac=0.05)
            loss = side.loss(step.micro_batches[0])
            loss.backward()
            side.optimizer.step()
            side.optimizer.zero_grad()
            losses.append(loss.item())
        curves.append(losses)
        shutil.rmtree(tmp_path / "locks", ignore_errors=True)  # of a run that has not ended as far as it knows
    slow, fast, half = curves
    assert len(slow) == 50 and slow[-1] < 0.9 * slow[0]
    assert fast == pytest.approx(slow, rel=1e-5)
    assert half == pytest.approx(slow, rel=5e-3)


@pytest.mark.parametrize(
    "argv, message", [(["--rounds", "0"], "--rounds"), (["--total-batch-size", "200"], "multiple|whole|batch")]
)
def test_what_cannot_be_is_said_first(argv, message):
    with pytest.raises(SystemExit, match=message):
        bench.main([*TINY, *argv])
