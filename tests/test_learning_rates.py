"""
Learning rates from the command line to the optimizer: what each parameter group uses at each step of base_train.

    python -m pytest tests/test_learning_rates.py
"""

from math import sqrt

import pytest
from conftest import golden

from nanochat.muon import MuonAdamW
from scripts import base_train

NUM_STEPS, WARMUP_STEPS, WARMDOWN_STEPS, FINAL_FRAC = 20, 4, 10, 0.1
BATCH, WIDTH = 256, 64
FLAGS = "--recipe nanochat --device cpu --no-compile --depth 2 --aspect-ratio 32 --head-dim 32 --max-seq-len 64".split()
FLAGS += f"--device-batch-size 4 --total-batch-size {BATCH} --num-iterations {NUM_STEPS} --warmdown-ratio 0.5".split()
FLAGS += f"--warmup-steps {WARMUP_STEPS} --final-lr-frac {FINAL_FRAC} --eval-every -1 --sample-every -1".split()
RESIDUAL_SCALARS = {"resid", "x0", "smear_backout"}


@pytest.fixture
def pretrain(base_dir, monkeypatch, golden_tokenizer):
    """Returns a function that pretrains and returns, for every optimizer step, the learning rates by group."""
    golden_tokenizer.save(base_dir / "tokenizer")
    monkeypatch.setenv("NANOCHAT_DATA_DIR", str(golden("packing/data")))
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    original_step = MuonAdamW.step
    recorded = []

    def recording_step(optimizer):
        rates = {}
        for group in optimizer.param_groups:
            assert rates.setdefault(group["name"], group["lr"]) == group["lr"]  # the same for matrices of all shapes
        recorded.append(rates)
        original_step(optimizer)

    def run(**flags):
        recorded.clear()
        base_train.main([*FLAGS, *(f"--{name.replace('_', '-')}={value}" for name, value in flags.items())])
        return list(recorded)

    monkeypatch.setattr(MuonAdamW, "step", recording_step)
    return run


def full_rates(*, embedding_lr=0.3, unembedding_lr=0.008, matrix_lr=0.02, scalar_lr=0.5):
    """
    The learning rates between warm-up and warm-down. All are scaled with the root of the batch size, those
    of the embedding tables and lm_head also with the width^-0.5.
    """
    by_batch = sqrt(BATCH / 2**19)
    by_width = by_batch * (WIDTH / 768) ** -0.5
    return {
        "wte": embedding_lr * by_width,
        "value_embeds": embedding_lr / 2 * by_width,
        "lm_head": unembedding_lr * by_width,
        "muon": matrix_lr * by_batch,
        "x0": scalar_lr * by_batch,
        "resid": scalar_lr / 100 * by_batch,
        "smear_backout": 0.2 * by_batch,
    }


@pytest.mark.slow
def test_learning_rate_flags_reach_all_groups(pretrain):
    flags = {"embedding_lr": 0.6, "unembedding_lr": 0.016, "matrix_lr": 0.03, "scalar_lr": 1.5}
    rates = pretrain(**flags, num_iterations=WARMUP_STEPS + 4)
    assert rates[WARMUP_STEPS] == pytest.approx(full_rates(**flags))


@pytest.mark.slow
def test_default_learning_rates_follow_warmup_and_warmdown(pretrain):
    rates = pretrain()
    warmup = [0.25, 0.5, 0.75, 1.0]
    constant = [1.0] * (NUM_STEPS - WARMUP_STEPS - WARMDOWN_STEPS)
    warmdown = [1.0, 0.91, 0.82, 0.73, 0.64, 0.55, 0.46, 0.37, 0.28, 0.19]  # 0.1 would follow after the last step
    for name, full in full_rates().items():
        multipliers = [step[name] / full for step in rates]
        if name in RESIDUAL_SCALARS:
            assert multipliers.pop(0) == 0  # they have no gradient yet, see recipe.py
            assert multipliers == pytest.approx([*warmup[1:], *constant, *warmdown])
        else:
            assert multipliers == pytest.approx([*warmup, *constant, *warmdown])
